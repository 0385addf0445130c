"""The most likely tokens of a row, without sorting the vocabulary.

A row of *gaps* says how far each token's logit lies below the row's largest, in units of the temperature: 0 for the
best token, infinity for one that must not be chosen. Tokens are ordered by (gap, token id), so there are no ties.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

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
