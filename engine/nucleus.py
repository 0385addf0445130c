"""Sampling from a nucleus without finding it.

The nucleus (top-p) is the beginning of the row's order by (gap, token id). So: sample from the whole row, which takes
no sorting, and look whether the winner lies inside, which takes one sum over the tokens before it. If it does, it is
also the winner of the nucleus, whose tokens all took part. If not, nothing from the winner on is in the nucleus:
sample again from what comes before it. With p = 0.9 a tenth of the rows need a second look; in general about
1 + log(1 / p) looks are needed, whatever the size of the nucleus.

The sum is taken in float32 first. Where its rounding could matter, it is taken in integers, as `engine.truncation`
defines it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gumbel import float_weights, largest_score
from engine.truncation import Limits, nucleus_limit, token_weights

_ROUNDING = 2e-5  # of the total; far more than float32 sums of 2^18 exponentials are off


def largest_score_in_nucleus(gaps: Tensor, keys: Tensor, words: Tensor, limits: Limits) -> Tensor:
    """The sampled token of each row, of those that min-p and top-p keep (top-k is off). [num_rows] int64

    gaps: [num_rows, vocab_size]; keys: [num_rows, 2]; words: [vocab_size]
    """
    weights = float_weights(gaps)
    if bool(limits.max_gap.isfinite().any()):
        # Comparing into floats, to multiply with, is three times as fast on the CPU as comparing into booleans.
        weights *= torch.le(gaps, limits.max_gap, out=torch.empty_like(gaps))
    if bool((limits.top_p >= 1.0).all()):
        return largest_score(gaps, weights, keys, words)
    total = weights.sum(-1, keepdim=True)
    rows = torch.arange(gaps.shape[0], device=gaps.device)
    tokens = torch.empty_like(rows)
    while len(rows):
        found = largest_score(gaps, weights, keys[rows], words)
        tokens[rows] = found
        is_outside = _is_outside(gaps, weights, found[:, None], total[rows], limits.select(rows))
        rows, found, gaps = rows[is_outside], found[is_outside], gaps[is_outside]
        weights = weights[is_outside] * _is_before(gaps, found[:, None])
    return tokens


def _is_outside(gaps: Tensor, weights: Tensor, token: Tensor, total: Tensor, limits: Limits) -> Tensor:
    """Whether each row's token lies outside its nucleus. [num_rows]

    gaps, weights: [num_rows, vocab_size]; token: [num_rows, 1]; total: [num_rows, 1] of the weights, before any token
    was excluded for lying behind one that was outside.
    """
    gap = gaps.gather(1, token)
    before = torch.le(gaps, gap, out=torch.empty_like(gaps)).mul_(weights)
    upper = before.sum(-1, keepdim=True) - weights.gather(1, token)
    is_outside = (upper >= (limits.top_p - _ROUNDING) * total) & (limits.top_p < 1.0)
    doubtful = is_outside[:, 0].nonzero()[:, 0]
    if not len(doubtful):
        return is_outside[:, 0]
    gaps, gap, token, some = gaps[doubtful], gap[doubtful], token[doubtful], limits.select(doubtful)
    lower = torch.lt(gaps, gap, out=torch.empty_like(gaps)).mul_(weights[doubtful]).sum(-1, keepdim=True)
    is_unclear = (lower <= (some.top_p + _ROUNDING) * total[doubtful])[:, 0]
    unclear = is_unclear.nonzero()[:, 0]
    if len(unclear):
        is_outside[doubtful[unclear]] = ~_is_inside(gaps[unclear], token[unclear], some.select(unclear))
    return is_outside[:, 0]


def _is_inside(gaps: Tensor, token: Tensor, limits: Limits) -> Tensor:
    """Whether each row's token lies inside its nucleus, by the definition. [num_rows, 1]"""
    weights = token_weights(gaps) * (gaps <= limits.max_gap)
    before = (weights * _is_before(gaps, token)).sum(-1, keepdim=True)
    return before < nucleus_limit(weights.sum(-1, keepdim=True), limits.top_p)


def _is_before(gaps: Tensor, token: Tensor) -> Tensor:
    """Which tokens come before one in the order (gap, token id). token: [num_rows, 1]"""
    gap = gaps.gather(1, token)
    ids = torch.arange(gaps.shape[1], device=gaps.device)
    return (gaps < gap) | ((gaps == gap) & (ids < token))
