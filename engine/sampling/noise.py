"""Noise for sampling: a pure function of (seed, position, token id), so that a seed always gives the same tokens.

Two stages, both counter based and made of 32-bit integer arithmetic, so that a GPU kernel can make the same bits:

1. A key of two words per (seed, position): Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
   1, 2, 3", section 3.3) with the seed as key and the position as counter. One evaluation per row.
2. A word per token: the token id passes a keyless mixing, then the two key words enter it in two rounds of a
   multiply-xorshift hash. The constants are those of "lowbias32" (Chris Wellons, hash-prospector: found by searching
   for the lowest avalanche bias). The keyless part depends on the vocabulary alone and is made once.

The low 31 bits of that word are the noise: v = (bits + 1/2) / 2^31 lies strictly between 0 and 1, the Gumbel noise is
-log(-log(1 - v)). Both logarithms are taken in float64, where 1 - v is exact, and the result is rounded to float32:
implementations of log differ in the last of 53 bits, which changes a rounding to 24 bits about once in 10^8.

On the host all of it is numpy's, which on one thread is faster than torch at it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from engine.arrays import Floats

NUM_NOISE_BITS = 31
_LOW_31_BITS = np.uint32((1 << NUM_NOISE_BITS) - 1)

_MULTIPLIER_1, _MULTIPLIER_2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)  # lowbias32
_PHILOX_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_PHILOX_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_PHILOX_ROUNDS = 10
_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)
_SEED = (1 << 64) - 1
_POSITIONS_AT_ONCE = 64  # evaluating that many costs no more than evaluating one

Words64 = npt.NDArray[np.uint64]  # 32-bit words, in 64 bits for the products
FourWords = tuple[Words64, Words64, Words64, Words64]
Words = npt.NDArray[np.uint32]


def philox4x32(counter: FourWords, key: tuple[Words64, Words64]) -> FourWords:
    """Philox4x32-10 of every element of equally shaped arrays."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        product0, product1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1 = (product1 >> _WORD_BITS) ^ c1 ^ k0, product1 & _WORD
        c2, c3 = (product0 >> _WORD_BITS) ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _WORD, (k1 + _PHILOX_WEYL[1]) & _WORD
    return c0, c1, c2, c3


def noise_keys(seeds: Words64, positions: npt.NDArray[np.int64]) -> Words:
    """The noise key of each row. [num_rows, 2]

    seeds, positions: [num_rows]; the position is the index that the sampled token will have in its sequence.
    """
    position_words = positions.astype(np.uint64)
    zeros = np.zeros_like(position_words)
    counter = (position_words & _WORD, position_words >> _WORD_BITS, zeros, zeros)
    k0, k1, _, _ = philox4x32(counter, (seeds & _WORD, seeds >> _WORD_BITS))
    return np.stack((k0, k1), axis=1).astype(np.uint32)


def noise_key(seed: int, position: int) -> Words:
    """The noise key of one row. [2]; seed: of any size, taken modulo 2^64"""
    block, offset = divmod(position, _POSITIONS_AT_ONCE)
    key: Words = _key_block(seed & _SEED, block)[offset]
    return key


@lru_cache(maxsize=4096)
def _key_block(seed: int, block: int) -> Words:
    positions = np.arange(_POSITIONS_AT_ONCE) + block * _POSITIONS_AT_ONCE
    return noise_keys(np.full(_POSITIONS_AT_ONCE, seed, dtype=np.uint64), positions)


def token_words(vocab_size: int) -> Words:
    """The keyless part of the noise, for every token id. [vocab_size]"""
    words = np.arange(vocab_size, dtype=np.uint32)
    words ^= words >> np.uint32(16)
    words *= _MULTIPLIER_1
    words ^= words >> np.uint32(15)
    words *= _MULTIPLIER_2
    return words


def noise_bits(words: Words, key: Words, *, out: Words | None = None, scratch: Words | None = None) -> Words:
    """31 random bits for every token of a row.

    words: [num_tokens] out of `token_words`; key: [2] of `noise_keys`; out, scratch: memory as large as the words.
    """
    bits: Words = np.bitwise_xor(words, key[0], out=out)
    shifted: Words = np.right_shift(bits, np.uint32(16), out=scratch)
    bits ^= shifted
    bits *= _MULTIPLIER_1
    bits ^= np.right_shift(bits, np.uint32(15), out=shifted)
    bits += key[1]
    bits *= _MULTIPLIER_2
    bits &= _LOW_31_BITS
    return bits


def gumbel(bits: Words) -> Floats:
    """Standard Gumbel noise of noise bits, between -3.1 and 22.2; falls as the bits rise."""
    v = (bits.astype(np.float64) + 0.5) * 2.0**-NUM_NOISE_BITS
    return (-np.log(-np.log(1.0 - v))).astype(np.float32)
