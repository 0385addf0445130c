"""Gumbel-max sampling: the token with the largest score = noise - gap is a sample of softmax(-gap).

(Gumbel 1954; Maddison, Tarlow and Minka 2014, "A* sampling", section 2.) The score is a float32 difference of the
float32 noise of `engine.sampling.noise` and the float32 gap; among equal scores the lowest token id wins. That is the
whole definition: `GumbelRace` finds the winner without taking a single logarithm for most tokens, and always the same
one.

How: noise -log(-log(1 - v)) never exceeds -log(v), so a token whose score is at least s has
log2(v) + gap / log(2) <= -s / log(2). The left side, the token's *time*, need not be exact, only never too high: read
as an integer, the bits of a float32 are a logarithm to the base 2, at most 0.09 too low (Mitchell 1962, "Computer
multiplication and division using binary logarithms"). The token with the lowest time gives a good s; only tokens
whose time is within its bound, a few of them whatever the distribution, are scored.
"""

from __future__ import annotations

import math

import numpy as np

from engine.arrays import Floats, Ints
from engine.sampling.noise import NUM_NOISE_BITS, Words, gumbel, noise_bits, token_words

_MANTISSA = float(1 << 23)  # of float32: one unit of the logarithm
_BIAS = 127.0  # of its exponent
_FARTHEST_GAP = np.float32(80.0)  # exponentials that underflow take many times as long
_SLACK = 1.0 / 256  # far more than the rounding of times and scores, all of them in float32
TIME_OF_GAP = np.float32(_MANTISSA / math.log(2.0))


class GumbelRace:
    """Samples rows of one vocabulary, in memory that it keeps."""

    def __init__(self, vocab_size: int) -> None:
        self.words = token_words(vocab_size)
        self._bits = np.empty(vocab_size, dtype=np.uint32)
        self._shifted = np.empty(vocab_size, dtype=np.uint32)
        self._times = np.empty(vocab_size, dtype=np.float32)

    def winner(self, gaps: Floats, key: Words) -> int:
        """The sampled token of a row.

        gaps: [vocab_size], at least one of them 0, infinite where a token must not come; key: [2] of `noise_keys`
        """
        self._start(gaps, key)
        bits, times = self._bits, self._times
        first = int(times.argmin())
        reached = _about_gumbel(int(bits[first])) - float(gaps[first])
        bound = (_BIAS + NUM_NOISE_BITS + _SLACK - reached / math.log(2.0)) * _MANTISSA
        runners = np.flatnonzero(times <= np.float32(bound))
        if len(runners) == 1:
            return first
        return int(runners[(gumbel(bits[runners]) - gaps[runners]).argmax()])

    def winner_among(self, tokens: Ints, gaps: Floats, key: Words) -> int:
        """The sampled token of a row of which only some tokens may come.

        tokens: [num_tokens] ascending ids; gaps: [num_tokens] of these
        """
        score = gumbel(noise_bits(self.words[tokens], key)) - gaps
        return int(tokens[score.argmax()])

    def total_weight(self, gaps: Floats) -> float:
        """The sum of exp(-gap), within 1e-5 of it. gaps: [vocab_size]"""
        return float(float_weights(gaps).sum())

    def _start(self, gaps: Floats, key: Words) -> None:
        """Makes the noise bits and the times of all tokens."""
        bits = noise_bits(self.words, key, out=self._bits, scratch=self._shifted)
        times = np.multiply(gaps, TIME_OF_GAP, out=self._times)
        values = self._shifted.view(np.float32)
        np.copyto(values, bits.view(np.int32), casting="unsafe")
        np.add(times, values.view(np.int32), out=times, dtype=np.float32, casting="unsafe")


def _about_gumbel(bits: int) -> float:
    """Gumbel noise but for its last bits, in a tenth of the time that arrays of one element take."""
    return -math.log(-math.log1p(-(bits + 0.5) * 2.0**-NUM_NOISE_BITS))


def float_weights(gaps: Floats) -> Floats:
    """exp(-gap), not normalised; 1e-35 and not 0 for infinite gaps. float32"""
    weights = np.minimum(gaps, _FARTHEST_GAP)
    np.negative(weights, out=weights)
    return np.exp(weights, out=weights)
