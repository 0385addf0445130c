"""Exact recovery of the integers and scales of a dequantised matrix (of GGUF's Q4_0, Q4_1 or Q8_0).

A loader hands matrices over as floats; with their integers back, they are stored as small as in the file, without loss.

A *level* is the integer of a weight. A group of 32 weights is accepted if level * scale + offset, computed in float32,
gives each of them back bit for bit.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kernels.numba.core.lanes import GROUP
from kernels.numba.core.memory import flags, float16_value, floats, to_float16_bits, words
from kernels.numba.kernel_cache import kernel


@njit
def _match(values, levels, scale, offset):
    """Fills the levels of a group for a scale and an offset, and returns whether they give back every weight."""
    inverse = np.float32(1.0) / scale if scale != np.float32(0.0) else np.float32(0.0)
    is_exact = True
    for i in range(GROUP):
        level = np.float32(int((values[i] - offset) * inverse + np.float32(0.5)))
        level = min(max(level, np.float32(0.0)), np.float32(15.0))
        levels[i] = np.uint8(level)
        is_exact = is_exact and level * scale + offset == values[i]
    return is_exact


@kernel("boolean(int64, int64, int64, int64, int64)", nogil=True)
def read_int4(weight, levels, scales, offsets, num_groups):
    """Fills levels (uint8 [num_groups, 32]), scales and offsets (float16 [num_groups]); false at the first group whose
    elements are not 16 levels: evenly spaced from the smallest (GGUF's Q4_1), or around zero (Q4_0).

    weight: float32 [num_groups, 32]. The arguments are addresses.
    """
    steps, starts = words(scales, num_groups), words(offsets, num_groups)
    for group in range(num_groups):
        values, own = floats(weight + group * GROUP * 4, GROUP), flags(levels + group * GROUP, GROUP)
        low, high = values[0], values[0]
        for i in range(GROUP):
            low, high = min(low, values[i]), max(high, values[i])
        steps[group] = to_float16_bits((high - low) / np.float32(15.0))
        starts[group] = to_float16_bits(low)
        if _match(values, own, float16_value(steps[group]), float16_value(starts[group])):
            continue
        extreme = high if high > -low else low  # Q4_0's step is an eighth of it, with the other sign
        steps[group] = to_float16_bits(extreme / np.float32(-8.0))
        starts[group] = to_float16_bits(extreme)
        if not _match(values, own, float16_value(steps[group]), float16_value(starts[group])):
            return False
    return True


@kernel("boolean(int64, int64, int64, int64)", nogil=True)
def read_int8(weight, levels, scales, num_groups):
    """Fills levels (int8 [num_groups, 32]) and scales (float16 [num_groups]); false at the first group whose elements
    are not whole multiples of a 127th of the largest (GGUF's Q8_0).
    """
    steps = words(scales, num_groups)
    for group in range(num_groups):
        values, own = floats(weight + group * GROUP * 4, GROUP), flags(levels + group * GROUP, GROUP)
        largest = np.float32(0.0)
        for i in range(GROUP):
            largest = max(largest, abs(values[i]))
        steps[group] = to_float16_bits(largest / np.float32(127.0))
        scale = float16_value(steps[group])
        inverse = np.float32(1.0) / scale if scale != np.float32(0.0) else np.float32(0.0)
        for i in range(GROUP):
            half = np.float32(0.5) if values[i] >= np.float32(0.0) else np.float32(-0.5)
            level = np.float32(int(values[i] * inverse + half))
            level = min(max(level, np.float32(-127.0)), np.float32(127.0))
            own[i] = np.uint8(np.int8(level))
            if level * scale != values[i]:
                return False
    return True
