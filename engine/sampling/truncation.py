"""Min-p, top-k and top-p: which tokens of a row may be sampled.

A row of *gaps* says how far each token's logit lies below the row's largest, in units of the temperature: 0 for the
best token, infinity for one that must not be chosen. Order the tokens by (gap, token id), so that there are no ties.
Then, each on what the one before left:

1. min-p keeps the tokens whose probability is at least min_p of the best token's (Nguyen et al. 2024, section 3.2):
   those whose gap is at most -log(min_p), the row's `max_gap`;
2. top-k keeps the first k;
3. top-p keeps a token while the probability of those before it is below p (nucleus sampling: Holtzman et al. 2020,
   section 3.1), so the first is always kept.

All three keep the first so many tokens of the order. Probabilities are integers: exp(-gap) in float64, in units of
2^-40. Their sums are exact in any order of summation, so there is one right answer, however a row comes to it:
from a list of its k most likely tokens (`first_tokens`), or without one (`Nucleus`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arrays import Bools, Floats, Ints
from engine.sampling.gumbel import float_weights
from engine.types import SamplingParams

_MAX_FINITE = np.finfo(np.float32).max


def gaps_below(peak: np.float32, logits: Floats, temperature: np.float32) -> Floats:
    """The gaps of a row, or of some of its tokens. logits: [num_tokens]; peak: the largest of the row"""
    gaps = peak - logits
    if temperature != 1.0:
        gaps /= temperature
    return gaps


def most_likely(gaps: Floats, num_tokens: int) -> Ints:
    """The first `num_tokens` tokens in the order (gap, token id), fewer where fewer have a finite gap.

    gaps: [vocab_size], none NaN; num_tokens: at least 1

    The vocabulary is dealt out to blocks. The num_tokens-th smallest block minimum is an upper bound of the
    num_tokens-th smallest gap, so only tokens within it need sorting; to find it costs one pass over memory.
    """
    minima = _block_minima(gaps, num_tokens)
    bound = np.partition(minima, num_tokens - 1)[num_tokens - 1] if num_tokens < len(minima) else minima.max()
    tokens = np.flatnonzero(gaps <= min(bound, _MAX_FINITE))
    return tokens[gaps[tokens].argsort(kind="stable")[:num_tokens]]


def keep_first(gaps: Floats, num_tokens: int) -> None:
    """Makes all gaps infinite, in place, but the first `num_tokens` in the order (gap, token id). Sorts nothing.

    gaps: [vocab_size], none NaN; num_tokens: at least 1, at most vocab_size
    """
    last = np.partition(gaps, num_tokens - 1)[num_tokens - 1]
    num_before = np.count_nonzero(gaps < last)
    equals = np.flatnonzero(gaps == last)
    gaps[gaps > last] = np.inf
    gaps[equals[num_tokens - num_before :]] = np.inf


def _block_minima(gaps: Floats, num_tokens: int) -> Floats:
    """The smallest gap of each block of tokens b, b + num_blocks, b + 2 * num_blocks, ... [num_blocks]

    As many blocks as make both steps short, the minima and their partition; at least `num_tokens` if there are as many.
    """
    block_size = math.isqrt(len(gaps) // num_tokens)
    if block_size < 2:
        return gaps
    num_full = len(gaps) // block_size
    minima: Floats = gaps[: num_full * block_size].reshape(block_size, num_full).min(0)
    rest = gaps[num_full * block_size :]
    if len(rest):
        np.minimum(minima[: len(rest)], rest, out=minima[: len(rest)])
    return minima


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


_ROUNDING = 2e-5  # of the total; far more than float32 sums of 2^18 exponentials are off


def surely_inside(before: Floats, totals: Floats, top_ps: NDArray[np.float64]) -> Bools:
    """Whether tokens lie inside their nuclei, beyond all doubt of rounding. [num_rows] each

    before, totals: float32 sums of exp(-gap) over the tokens before each, and over all of its row
    """
    inside: Bools = before < (top_ps - _ROUNDING) * totals
    return inside


class Nucleus:
    """The nucleus of one row, which is sampled without being found: it is only asked whether a token lies inside.

    Sample from the whole row, which takes no sorting, and look whether the winner lies inside, which takes one sum over
    the tokens before it. If it does, it is also the winner of the nucleus, whose tokens all took part. If not, nothing
    from the winner on is in the nucleus: sample again from what comes before it. With p = 0.9 a tenth of the rows need
    a second look; in general about 1 + log(1 / p) looks are needed, whatever the size of the nucleus.

    The sum is taken in float32 first, and in the integers that define top-p where its rounding could matter.

    gaps: [vocab_size], infinite for what min-p excludes; total: the sum of exp(-gap), within 1e-5 of it
    """

    def __init__(self, gaps: Floats, top_p: float, *, total: float) -> None:
        self.gaps, self.top_p = gaps, top_p
        self._total = total

    def before(self, token: int) -> Ints:
        """The tokens that come before one in the order (gap, token id), by ascending id."""
        tokens = np.flatnonzero(self.gaps <= self.gaps[token])
        kept: Ints = tokens[(tokens < token) | (self.gaps[tokens] < self.gaps[token])]
        return kept

    def holds(self, before: Ints) -> bool:
        """Whether a token lies inside, of which `before` are the tokens before it."""
        weight = float(float_weights(self.gaps[before]).sum())
        if weight < (self.top_p - _ROUNDING) * self._total:
            return True
        if weight > (self.top_p + _ROUNDING) * self._total:
            return False
        total = int(token_weights(self.gaps).sum())
        return int(token_weights(self.gaps[before]).sum()) < nucleus_limit(total, self.top_p)
