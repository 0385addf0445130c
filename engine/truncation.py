"""Min-p, top-k and top-p: which tokens of a row may be sampled.

The definition, for a row of gaps (see `engine.candidates`): order the tokens by (gap, token id). Then, each on what
the one before left:

1. min-p keeps the tokens whose probability is at least min_p of the best token's (Nguyen et al. 2024, section 3.2):
   those whose gap is at most -log(min_p), the row's `max_gap`;
2. top-k keeps the first k;
3. top-p keeps a token while the probability of those before it is below p (nucleus sampling: Holtzman et al. 2020,
   section 3.1), so the first is always kept.

All three keep the first so many tokens of the order. Probabilities are integers: exp(-gap) in float64, in units of
2^-40. Their sums are exact in any order of summation, so there is one right answer, however a row comes to it:
from a list of its k most likely tokens, from its gaps sorted, or (`engine.nucleus`) without either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.candidates import most_likely

WEIGHT_UNIT = 2.0**40  # the sum over 2^18 tokens stays below 2^63


@dataclass(frozen=True, slots=True)
class Limits:
    """What each row keeps, in columns of shape [num_rows, 1]."""

    max_gap: Tensor  # float32, infinity is off
    top_k: Tensor  # int64, at least 1, the vocabulary's size is off
    top_p: Tensor  # float64, 1 is off

    def select(self, rows: Tensor) -> Limits:
        """The limits of some rows."""
        return Limits(self.max_gap[rows], self.top_k[rows], self.top_p[rows])


def truncated_list(gaps: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """The kept tokens of rows with a small top_k: their gaps, infinite past the last that is kept, and their ids.

    gaps: [num_rows, vocab_size]; returns [num_rows, largest top_k] twice
    """
    listed, tokens = most_likely(gaps, int(limits.top_k.max()))
    rank = torch.arange(listed.shape[1], device=gaps.device)
    return listed.masked_fill(rank >= _num_kept(listed, limits), torch.inf), tokens


def is_kept_sorted(gaps: Tensor, limits: Limits) -> Tensor:
    """Whether each token is kept. Sorts every row: for a large top_k. [num_rows, vocab_size]"""
    ordered = _sort(gaps)
    num_kept = _num_kept(ordered, limits)
    last_kept = ordered.gather(1, num_kept - 1)
    # Of the tokens level with the last that is kept, those with the lowest ids stay.
    num_level_kept = num_kept - torch.searchsorted(ordered, last_kept)
    is_level = gaps == last_kept
    return (gaps < last_kept) | (is_level & (is_level.cumsum(-1) <= num_level_kept))


def token_weights(gaps: Tensor) -> Tensor:
    """Probabilities that are not normalised, as integers. int64"""
    return gaps.double().neg_().exp_().mul_(WEIGHT_UNIT).round_().long()


def nucleus_limit(total: Tensor, top_p: Tensor) -> Tensor:
    """A token is kept while those before it weigh less than this. total: int64; returns int64, at least 1"""
    return (total.double() * top_p).ceil_().long().clamp_min_(1)


def _num_kept(ordered: Tensor, limits: Limits) -> Tensor:
    """How many tokens a row keeps. ordered: [num_rows, num_tokens] ascending gaps; returns [num_rows, 1]"""
    num_left = torch.minimum(torch.searchsorted(ordered, limits.max_gap, right=True), limits.top_k)
    weights = token_weights(ordered)
    upto = weights.cumsum(-1)
    total = upto.gather(1, num_left - 1)
    num_before = torch.searchsorted(upto - weights, nucleus_limit(total, limits.top_p))
    return torch.where(limits.top_p < 1.0, torch.minimum(num_left, num_before), num_left)


def _sort(gaps: Tensor) -> Tensor:
    if gaps.is_cpu:  # numpy sorts floats with vector instructions, 15 times as fast as torch
        return torch.from_numpy(np.sort(gaps.numpy(), axis=-1))
    return gaps.sort(dim=-1).values
