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
from a list of its k most likely tokens, or (`engine.nucleus`) without one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from engine.candidates import Floats, Ints, most_likely
from engine.types import SamplingParams

WEIGHT_UNIT = 2.0**40  # the sum over 2^18 tokens stays below 2^63


class Limits(NamedTuple):
    """What a row keeps."""

    max_gap: np.float32  # infinity is off
    top_k: int  # at least 1, the vocabulary's size is off
    top_p: float  # 1 is off


def limits_of(params: SamplingParams, vocab_size: int) -> Limits:
    max_gap = np.float32(-math.log(params.min_p) if params.min_p > 0.0 else math.inf)
    top_k = params.top_k if 1 <= params.top_k < vocab_size else vocab_size
    return Limits(max_gap, top_k, min(params.top_p, 1.0))


def first_tokens(gaps: Floats, limits: Limits) -> Ints:
    """The tokens that a row keeps, in ascending order of ids: for a row whose top_k is on.

    gaps: [vocab_size]
    """
    tokens = most_likely(gaps, limits.top_k)
    ordered = gaps[tokens]
    num_kept = int(np.searchsorted(ordered, limits.max_gap, side="right"))
    if limits.top_p < 1.0:
        weights = token_weights(ordered[:num_kept])
        upto = weights.cumsum()
        num_kept = int(np.searchsorted(upto - weights, nucleus_limit(int(upto[-1]), limits.top_p)))
    kept: Ints = np.sort(tokens[:num_kept])
    return kept


def token_weights(gaps: Floats) -> Ints:
    """Probabilities that are not normalised, as integers."""
    weights: Ints = np.rint(np.exp(-gaps.astype(np.float64)) * WEIGHT_UNIT).astype(np.int64)
    return weights


def nucleus_limit(total: int, top_p: float) -> int:
    """A token is kept while those before it weigh less than this. At least 1."""
    return max(1, math.ceil(float(total) * top_p))
