"""Top-k and top-p: which tokens of a row may be sampled.

The definition, for a row of gaps (see `engine.candidates`; min-p has already made some of them infinite): order the
tokens by (gap, token id). Top-k keeps the first k. Top-p (nucleus sampling: Holtzman et al. 2020, section 3.1) keeps
a token while the probability of those before it, among what top-k left, is below p; so the first is always kept.

Probabilities are integers: exp(-gap) in float64, in units of 2^-40. Their sums are exact in any order, so a row keeps
the same tokens whatever way they were found: from a short list of the most likely, or, where the nucleus is not
inside it, from all gaps sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.candidates import most_likely

MAX_LISTED = 1024  # a larger top_k goes by sorting
_NUCLEUS_LISTED = 256  # enough for most nuclei
_WEIGHT_UNIT = 2.0**40
_TOTAL_ERROR = 1e-5  # relative; well above the rounding of a float32 sum of exponentials


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The most likely tokens of each row. Where `is_complete` is false, a row may keep tokens that are not listed."""

    gaps: Tensor  # [num_rows, num_listed], infinite where the row does not keep the token
    tokens: Tensor  # [num_rows, num_listed]
    is_complete: Tensor  # [num_rows]


def shortlist(gaps: Tensor, top_k: Tensor, top_p: Tensor) -> Shortlist:
    """Lists the kept tokens of rows that keep few.

    gaps: [num_rows, vocab_size]; top_k: [num_rows] int64, at least 1, the vocabulary's size is off; top_p: [num_rows]
    float64, 1 is off.
    """
    vocab_size = gaps.shape[1]
    has_short_k = top_k <= MAX_LISTED
    num_listed = min(vocab_size, int(torch.where(has_short_k, top_k, _NUCLEUS_LISTED).max()))
    listed, tokens = most_likely(gaps, num_listed)
    weights = _weights(listed)
    before = weights.cumsum(-1) - weights
    rank = torch.arange(num_listed, device=gaps.device)
    in_top_k = rank < top_k[:, None]
    exact_total = (weights * in_top_k).sum(-1).double()
    if bool(has_short_k.all()):
        low = high = exact_total
    else:
        total = gaps.neg().exp_().sum(-1).double() * _WEIGHT_UNIT
        low = torch.where(has_short_k, exact_total, total * (1.0 - _TOTAL_ERROR))
        high = torch.where(has_short_k, exact_total, total * (1.0 + _TOTAL_ERROR))
    kept = in_top_k & _in_nucleus(before, low, top_p)
    may_be_kept = in_top_k & _in_nucleus(before, high, top_p)
    is_bounded = has_short_k | ~may_be_kept[:, -1] | torch.isinf(listed[:, -1])
    is_complete = is_bounded & (kept == may_be_kept).all(-1) & (has_short_k | (top_k == vocab_size))
    return Shortlist(listed.masked_fill(~kept, torch.inf), tokens, is_complete)


def truncate_sorted(gaps: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The gaps, infinite where a token is not kept. Same arguments as `shortlist`; sorts every row."""
    ordered = _sort(gaps)
    weights = _weights(ordered)
    in_top_k = torch.arange(gaps.shape[1], device=gaps.device) < top_k[:, None]
    weights *= in_top_k
    before = weights.cumsum(-1) - weights
    total = weights.sum(-1).double()
    num_kept = (in_top_k & _in_nucleus(before, total, top_p)).sum(-1, keepdim=True)
    last_kept = ordered.gather(1, num_kept - 1)
    num_below = (ordered < last_kept).sum(-1, keepdim=True)
    # Of the tokens level with the last that is kept, those with the lowest ids stay.
    is_level = gaps == last_kept
    is_kept = (gaps < last_kept) | (is_level & (is_level.cumsum(-1) <= num_kept - num_below))
    return gaps.masked_fill(~is_kept, torch.inf)


def _in_nucleus(before: Tensor, total: Tensor, top_p: Tensor) -> Tensor:
    """Whether the tokens before each token weigh less than top_p of the total. before: [num_rows, num_tokens]"""
    limit = torch.where(top_p < 1.0, total * top_p, torch.inf)
    in_nucleus = before < limit[:, None]
    in_nucleus[:, 0] = True
    return in_nucleus


def _weights(gaps: Tensor) -> Tensor:
    return gaps.double().neg_().exp_().mul_(_WEIGHT_UNIT).round_().long()


def _sort(gaps: Tensor) -> Tensor:
    if gaps.is_cpu:  # numpy sorts floats with vector instructions, 15 times as fast as torch
        return torch.from_numpy(np.sort(gaps.numpy(), axis=-1))
    return gaps.sort(dim=-1).values
