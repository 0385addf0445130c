"""The two loops over a whole vocabulary that sampling a token takes on a CPU."""

from __future__ import annotations

import numpy as np
from numba import float32, types, uint32

from kernels.numba.kernel_cache import kernel
from kernels.numba.ops.elementwise import REORDERED

_FLOATS, _WORDS = types.Array(float32, 1, "C"), types.Array(uint32, 1, "C")
_LOG2E = np.float32(1.4426950408889634)
_SMALLEST_EXPONENT = np.float32(-126.0)  # below it, float32 loses its bits


@kernel(types.void(_FLOATS, _WORDS, uint32, uint32, float32, _WORDS, _FLOATS), nogil=True)
def draw_noise(gaps, words, first_key, second_key, time_of_gap, bits, times):
    """Fills the noise bits (`engine.sampling.noise.noise_bits`) and the times (`engine.sampling.gumbel`) of all tokens.

    Both are in the order of the token ids, as `words`, of `engine.sampling.noise.token_words`.
    """
    for i in range(len(gaps)):
        x = np.uint32(words[i] ^ first_key)  # Numba widens integers to 64 bits unless each result is cast
        x = np.uint32(x ^ np.uint32(x >> np.uint32(16)))
        x = np.uint32(x * np.uint32(0x7FEB352D))
        x = np.uint32(x ^ np.uint32(x >> np.uint32(15)))
        x = np.uint32(x + second_key)
        x = np.uint32(np.uint32(x * np.uint32(0x846CA68B)) & np.uint32(0x7FFFFFFF))
        bits[i] = x
        times[i] = gaps[i] * time_of_gap + np.float32(np.float32(np.int32(x)).view(np.int32))


@kernel(types.float32(_FLOATS), nogil=True, fastmath=REORDERED)
def sum_weights(gaps):
    """The sum of exp(-gap), to about 1e-6 of it. Infinite gaps weigh 1e-38."""
    total = np.float32(0.0)
    for i in range(len(gaps)):
        power = max(gaps[i] * -_LOG2E, _SMALLEST_EXPONENT)
        whole = np.int32(power)  # towards zero: the fraction lies in (-1, 0]
        x = np.float32(power - np.float32(whole))
        # 2^x, the series of exp(x * ln 2): the next term is below 2e-6
        y = np.float32(1.5252734e-5)
        y = y * x + np.float32(1.5403530e-4)
        y = y * x + np.float32(1.3333558e-3)
        y = y * x + np.float32(9.6181291e-3)
        y = y * x + np.float32(5.5504109e-2)
        y = y * x + np.float32(2.4022651e-1)
        y = y * x + np.float32(6.9314718e-1)
        y = y * x + np.float32(1.0)
        total += y * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)
    return total
