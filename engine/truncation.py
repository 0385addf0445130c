"""Min-p, top-k and top-p: which tokens of a row may be sampled.

The definition, for a row of gaps (see `engine.candidates`): order the tokens by (gap, token id). Then, each on what
the one before left:

1. min-p keeps the tokens whose probability is at least min_p of the best token's (Nguyen et al. 2024, section 3.2):
   those whose gap is at most -log(min_p), the row's `max_gap`;
2. top-k keeps the first k;
3. top-p keeps a token while the probability of those before it is below p (nucleus sampling: Holtzman et al. 2020,
   section 3.1), so the first is always kept.

All three keep the first so many tokens of the order. Probabilities are integers: exp(-gap) in float64, in units of
2^-40. Their sums are exact whatever the order of summation, so a row keeps the same tokens whether its nucleus was
found in a short list of the most likely tokens or, where it is not inside that, among all gaps, sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.candidates import most_likely

_MAX_LISTED = 1024  # a larger top_k goes by sorting
_NUCLEUS_LISTED = 256  # enough for most nuclei
_WEIGHT_UNIT = 2.0**40  # the sum over 2^18 tokens stays below 2^63
_TOTAL_ERROR = 1e-5  # relative; well above the rounding of a float32 sum of exponentials


@dataclass(frozen=True, slots=True)
class Limits:
    """What each row keeps, in columns of shape [num_rows, 1]."""

    max_gap: Tensor  # float32, infinity is off
    top_k: Tensor  # int64, at least 1, the vocabulary's size is off
    top_p: Tensor  # float64, 1 is off

    def select(self, rows: Tensor) -> Limits:
        """The limits of some rows."""
        return Limits(self.max_gap[rows], self.top_k[rows], self.top_p[rows])


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The most likely tokens of each row. Where `is_complete` is false, the row may keep tokens that are not listed."""

    gaps: Tensor  # [num_rows, num_listed], infinite where the row does not keep the token
    tokens: Tensor  # [num_rows, num_listed]
    is_complete: Tensor  # [num_rows]


def shortlist(gaps: Tensor, limits: Limits) -> Shortlist:
    """Lists the tokens of rows that keep few. gaps: [num_rows, vocab_size]"""
    has_short_k = limits.top_k <= _MAX_LISTED
    wanted = torch.where(has_short_k, limits.top_k, min(_NUCLEUS_LISTED, gaps.shape[1]))
    num_listed = int(wanted.max())
    listed, tokens = most_likely(gaps, num_listed)
    # After min-p and top-k, nothing is left beyond the list of most rows: their total is exact.
    last = listed[:, -1:]
    is_all = (limits.top_k <= num_listed) | (last > limits.max_gap) | last.isinf()
    before = _sums_before(listed)
    num_left = _num_left(listed, limits)
    exact_total = before.gather(1, num_left).double()
    low = high = exact_total
    if not bool(is_all.all()):
        total = gaps.neg().exp_().sum(-1, keepdim=True).double() * _WEIGHT_UNIT
        is_estimated = ~is_all & limits.max_gap.isinf() & (limits.top_k == gaps.shape[1])
        low = torch.where(is_estimated, total * (1.0 - _TOTAL_ERROR), exact_total)
        high = torch.where(is_estimated, total * (1.0 + _TOTAL_ERROR), exact_total)
        is_all |= is_estimated & (_num_in_nucleus(before, high, limits.top_p) < num_listed)
    num_kept = torch.minimum(num_left, _num_in_nucleus(before, low, limits.top_p))
    is_sure = num_kept == torch.minimum(num_left, _num_in_nucleus(before, high, limits.top_p))
    rank = torch.arange(num_listed, device=gaps.device)
    return Shortlist(listed.masked_fill(rank >= num_kept, torch.inf), tokens, (is_all & is_sure)[:, 0])


def truncate_sorted(gaps: Tensor, limits: Limits) -> Tensor:
    """The gaps, infinite where a token is not kept. Sorts every row: for those that keep many."""
    ordered = _sort(gaps)
    before = _sums_before(ordered)
    num_left = _num_left(ordered, limits)
    total = before.gather(1, num_left).double()
    num_kept = torch.minimum(num_left, _num_in_nucleus(before, total, limits.top_p))
    last_kept = ordered.gather(1, num_kept - 1)
    kept = torch.where(gaps <= last_kept, gaps, torch.inf)
    # Of the tokens level with the last that is kept, those with the lowest ids stay.
    num_level_kept = num_kept - torch.searchsorted(ordered, last_kept)
    is_cut = torch.searchsorted(ordered, last_kept, right=True) > num_kept
    cut_rows = is_cut[:, 0].nonzero()[:, 0]
    if len(cut_rows):
        is_level = gaps[cut_rows] == last_kept[cut_rows]
        is_surplus = is_level & (is_level.cumsum(-1) > num_level_kept[cut_rows])
        kept[cut_rows] = kept[cut_rows].masked_fill(is_surplus, torch.inf)
    return kept


def _num_left(ordered: Tensor, limits: Limits) -> Tensor:
    """How many tokens min-p and top-k keep. ordered: [num_rows, num_tokens] ascending; returns [num_rows, 1]"""
    return torch.minimum(torch.searchsorted(ordered, limits.max_gap, right=True), limits.top_k)


def _num_in_nucleus(before: Tensor, total: Tensor, top_p: Tensor) -> Tensor:
    """How many tokens have less than top_p of the total before them, at least 1. [num_rows, 1]

    before: [num_rows, num_tokens + 1] of `_sums_before`; total: [num_rows, 1] float64
    """
    limit = (total * top_p).ceil_().long()
    num_before = torch.searchsorted(before[:, :-1].contiguous(), limit)
    return torch.where(top_p < 1.0, num_before.clamp_min(1), before.shape[1])


def _sums_before(ordered: Tensor) -> Tensor:
    """What the tokens before each token weigh together; the last entry is the sum. [num_rows, num_tokens + 1] int64"""
    weights = ordered.double().neg_().exp_().mul_(_WEIGHT_UNIT).round_().long()
    before = weights.new_zeros(weights.shape[0], weights.shape[1] + 1)
    torch.cumsum(weights, -1, out=before[:, 1:])
    return before


def _sort(gaps: Tensor) -> Tensor:
    if gaps.is_cpu:  # numpy sorts floats with vector instructions, 15 times as fast as torch
        return torch.from_numpy(np.sort(gaps.numpy(), axis=-1))
    return gaps.sort(dim=-1).values
