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
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_NOISE_BITS = 31
_LOW_31_BITS = (1 << NUM_NOISE_BITS) - 1

_MULTIPLIER_1, _MULTIPLIER_2 = 0x7FEB352D, 0x846CA68B  # lowbias32
_PHILOX_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_PHILOX_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_PHILOX_ROUNDS = 10
_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)

Words = npt.NDArray[np.uint64]  # 32-bit words, in 64 bits for the products
FourWords = tuple[Words, Words, Words, Words]


def philox4x32(counter: FourWords, key: tuple[Words, Words]) -> FourWords:
    """Philox4x32-10 of every element of equally shaped arrays."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        product0, product1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1 = (product1 >> _WORD_BITS) ^ c1 ^ k0, product1 & _WORD
        c2, c3 = (product0 >> _WORD_BITS) ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _WORD, (k1 + _PHILOX_WEYL[1]) & _WORD
    return c0, c1, c2, c3


def noise_keys(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """The noise key of each row. [num_rows, 2] int32

    seeds, positions: [num_rows]; the position is the index that the sampled token will have in its sequence.
    """
    position_words = positions.astype(np.uint64)
    zeros = np.zeros_like(position_words)
    counter = (position_words & _WORD, position_words >> _WORD_BITS, zeros, zeros)
    k0, k1, _, _ = philox4x32(counter, (seeds & _WORD, seeds >> _WORD_BITS))
    keys = np.stack((k0, k1), axis=1).astype(np.uint32).view(np.int32)
    return torch.from_numpy(keys).to(device)


def token_words(vocab_size: int, device: torch.device) -> Tensor:
    """The keyless part of the noise, for every token id. [vocab_size] int32"""
    words = torch.arange(vocab_size, dtype=torch.int32, device=device)
    words ^= _shift_right(words, 16)
    words *= _signed(_MULTIPLIER_1)
    words ^= _shift_right(words, 15)
    words *= _signed(_MULTIPLIER_2)
    return words


def noise_bits(words: Tensor, keys: Tensor) -> Tensor:
    """31 random bits for every token of every row. int32, never negative

    words: [num_rows or 1, num_tokens] int32, out of `token_words`; keys: [num_rows, 2] from `noise_keys`.
    """
    bits = words ^ keys[:, :1]
    scratch = torch.empty_like(bits)
    bits ^= _shift_right(bits, 16, out=scratch)
    bits *= _signed(_MULTIPLIER_1)
    bits ^= _shift_right(bits, 15, out=scratch)
    bits += keys[:, 1:]
    bits *= _signed(_MULTIPLIER_2)
    bits &= _LOW_31_BITS
    return bits


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise of noise bits, float32, between -3.1 and 22.2; falls as the bits rise."""
    v = (bits.double() + 0.5) * 2.0**-NUM_NOISE_BITS
    return (1.0 - v).log_().neg_().log_().neg_().float()


def _shift_right(words: Tensor, num_bits: int, *, out: Tensor | None = None) -> Tensor:
    """Shifts zeros in, where torch's shift of int32 copies the sign."""
    return torch.bitwise_right_shift(words, num_bits, out=out).bitwise_and_((1 << (32 - num_bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
