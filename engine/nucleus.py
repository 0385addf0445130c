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

from engine.gumbel import FARTHEST_GAP, largest_score
from engine.truncation import Limits, nucleus_limit, token_weights

_ROUNDING = 2e-5  # of the total; far more than float32 sums of 2^18 exponentials are off


def largest_score_in_nucleus(gaps: Tensor, keys: Tensor, words: Tensor, limits: Limits) -> Tensor:
    """The sampled token of each row, of those that min-p and top-p keep (top-k is off). [num_rows] int64

    gaps: [num_rows, vocab_size]; keys: [num_rows, 2]; words: [vocab_size]
    """
    if not bool(limits.max_gap.isinf().all()):
        gaps = torch.where(gaps <= limits.max_gap, gaps, torch.inf)
    total = _float_weights(gaps).sum(-1, keepdim=True)
    rows = torch.arange(gaps.shape[0], device=gaps.device)
    left, tokens = gaps, torch.empty_like(rows)
    while len(rows):
        found = largest_score(left, keys[rows], words)
        tokens[rows] = found
        inside, outside = _compare(left, found[:, None], total[rows], limits.top_p[rows])
        unclear = (~inside & ~outside).nonzero()[:, 0]
        if len(unclear):
            outside[unclear] = ~_is_inside(gaps[rows[unclear]], found[unclear, None], limits.top_p[rows[unclear]])
        rows, found, left = rows[outside], found[outside], left[outside]
        left = torch.where(_is_before(left, found[:, None]), left, torch.inf)
    return tokens


def _compare(gaps: Tensor, token: Tensor, total: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each row's token is certainly inside its nucleus, and whether certainly outside. [num_rows] each

    gaps: [num_rows, vocab_size]; token, total, top_p: [num_rows, 1]
    """
    gap = gaps.gather(1, token)
    weights = _float_weights(gaps)
    # Comparing into floats, to multiply with, is three times as fast on the CPU as comparing into booleans.
    chosen = torch.lt(gaps, gap, out=torch.empty_like(gaps)).mul_(weights)
    lower = chosen.sum(-1, keepdim=True)
    upper = torch.le(gaps, gap, out=chosen).mul_(weights).sum(-1, keepdim=True) - gap.neg().exp()
    inside = (top_p >= 1.0) | (upper < (top_p - _ROUNDING) * total)
    outside = (top_p < 1.0) & (lower > (top_p + _ROUNDING) * total)
    return inside[:, 0], outside[:, 0]


def _float_weights(gaps: Tensor) -> Tensor:
    return gaps.clamp_max(FARTHEST_GAP).neg_().exp_()


def _is_inside(gaps: Tensor, token: Tensor, top_p: Tensor) -> Tensor:
    """The same by the definition. [num_rows]"""
    weights = token_weights(gaps)
    before = weights.mul(_is_before(gaps, token)).sum(-1, keepdim=True)
    return (before < nucleus_limit(weights.sum(-1, keepdim=True), top_p))[:, 0]


def _is_before(gaps: Tensor, token: Tensor) -> Tensor:
    """Which tokens come before one in the order (gap, token id). token: [num_rows, 1]"""
    gap = gaps.gather(1, token)
    ids = torch.arange(gaps.shape[1], device=gaps.device)
    return (gaps < gap) | ((gaps == gap) & (ids < token))
