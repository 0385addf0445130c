"""The operations between two matrix products: normalisation, rotation, KV write, activation, rounding to integers.

Each function computes some rows of one operation, in float32; a row's result does not depend on the other rows.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from kernels.numba.core.formats import BFLOAT16, FLOAT32, GROUP, INT8
from kernels.numba.core.lanes import (
    LANES,
    largest_magnitude,
    round_groups,
    round_groups_to_bytes,
    silu_and_multiply,
)
from kernels.numba.core.memory import (
    bfloat16_value,
    codes,
    float16_value,
    floats,
    integers,
    to_bfloat16_bits,
    to_float16_bits,
    words,
)

# sums may be reordered, so that they are vectors; NaN and infinity stay what they are
REORDERED = {"reassoc", "contract", "nsz"}
_FUSED = {"contract"}
_LARGEST_CODE, _SMALLEST = np.float32(127.0), np.float32(1e-30)  # as of `kernels.reference.kv_codes`


@njit(fastmath=REORDERED)
def _inverse_norm(x, size, eps):
    """1 / sqrt(mean of squares + eps)"""
    total = np.float32(0.0)
    for i in range(size):
        total += x[i] * x[i]
    return np.float32(1.0) / np.float32(math.sqrt(total / np.float32(size) + eps))


@njit
def normalise_rows(x, weight, out, first, last, size, eps):
    """As `kernels.reference.norm.rms_norm`, for rows first..last of x and out: float32 [rows, size]."""
    factors = floats(weight, size)
    for row in range(first, last):
        source, target = floats(x + row * size * 4, size), floats(out + row * size * 4, size)
        inverse = _inverse_norm(source, size, eps)
        for i in range(size):
            target[i] = source[i] * inverse * factors[i]


@njit
def _normalise_head(x, weight, size, eps):
    head, factors = floats(x, size), floats(weight, size)
    inverse = _inverse_norm(head, size, eps)
    for i in range(size):
        head[i] = head[i] * inverse * factors[i]


@njit
def normalise_parts(x, weight, first, last, size, stride, eps):
    """Normalises the first `size` elements of rows first..last in place. x: float32 [rows, stride]"""
    for row in range(first, last):
        _normalise_head(x + row * stride * 4, weight, size, eps)


@njit(fastmath=_FUSED)
def _rotate_head(x, cos, sin, half):
    """As `kernels.reference.rope.apply_rope`, for one head in place. cos, sin: [2 * half], sin's first half negated"""
    low, high = floats(x, half), floats(x + half * 4, half)
    cosines, sines = floats(cos, half), floats(sin + half * 4, half)
    for i in range(half):
        a, b = low[i], high[i]
        low[i] = a * cosines[i] - b * sines[i]
        high[i] = b * cosines[i] + a * sines[i]


@njit
def _store(value, address, kind):
    if kind == FLOAT32:
        floats(address, 1)[0] = value
    elif kind == BFLOAT16:
        words(address, 1)[0] = to_bfloat16_bits(value)
    else:  # clamped to the range of float16: an infinity would make every sum that it enters infinite or NaN
        words(address, 1)[0] = to_float16_bits(min(max(value, np.float32(-65504.0)), np.float32(65504.0)))


@njit
def _store_codes(new, size, first, stride, scale):
    """As `kernels.reference.kv_codes.encode` to int8, for one token and head.

    new: address of float32 [size]; first: address of the first code; stride: bytes to the next; scale: its address
    """
    values, target = floats(new, size), codes(first, (size - 1) * stride + 1)
    largest = largest_magnitude(new, size // LANES)
    floats(scale, 1)[0] = largest / _LARGEST_CODE if not largest <= _SMALLEST else np.float32(0.0)
    inverse = _LARGEST_CODE / largest if largest > _SMALLEST else np.float32(0.0)
    if inverse == np.float32(0.0):  # zeros, or no number: what its product with zero is, an integer cannot be
        for i in range(size):
            target[i * stride] = np.int8(0)
        return
    for i in range(size):
        target[i * stride] = np.int8(np.rint(values[i] * inverse))


@njit
def rotate_and_store_rows(
    qkv,
    first,
    last,
    num_heads,
    num_kv_heads,
    size,
    q_norm,
    k_norm,
    eps,
    positions,
    cos,
    sin,
    width,
    slots,
    keys,
    values,
    kind,
    block,
    block_bytes,
    head_bytes,
):
    """As `kernels.reference.qkv.rotate_and_store`, for rows first..last; queries and keys are changed in place.

    qkv: float32 [rows, (num_heads + 2 * num_kv_heads) * size]; q_norm, k_norm: float32 [size], or 0
    positions, slots: int64 [rows]; cos, sin: float32 [positions, width], width rotated elements of a head, 0 for none
    keys, values: one layer's cache, addresses of the first head of block 0, elements of `kind`: of a block, each head's
    keys are [size, block] and its values [block, size]; of INT8, float32 [block] are the scales behind each of them
    block_bytes, head_bytes: from a block to the next, and a head
    """
    element = 4 if kind == FLOAT32 else 1 if kind == INT8 else 2
    row_bytes = (num_heads + 2 * num_kv_heads) * size * 4
    row_slots, row_positions = integers(slots, last), integers(positions, last)
    for row in range(first, last):
        heads = qkv + row * row_bytes
        for head in range(num_heads + num_kv_heads):
            address = heads + head * size * 4
            norm = q_norm if head < num_heads else k_norm
            if norm != 0:
                _normalise_head(address, norm, size, eps)
            if width != 0:
                angle = row_positions[row] * width * 4
                _rotate_head(address, cos + angle, sin + angle, width // 2)
        page, offset = row_slots[row] // block, row_slots[row] % block
        for head in range(num_kv_heads):
            new_keys = floats(heads + (num_heads + head) * size * 4, size)
            new_values = floats(heads + (num_heads + num_kv_heads + head) * size * 4, size)
            head_offset = page * block_bytes + head * head_bytes
            key_column = keys + head_offset + offset * element
            value_row = values + head_offset + offset * size * element
            if kind == INT8:
                scale = head_offset + block * size + offset * 4
                _store_codes(heads + (num_heads + head) * size * 4, size, key_column, block, keys + scale)
                new = heads + (num_heads + num_kv_heads + head) * size * 4
                _store_codes(new, size, value_row, 1, values + scale)
                continue
            for i in range(size):
                _store(new_keys[i], key_column + i * block * element, kind)
            for i in range(size):
                _store(new_values[i], value_row + i * element, kind)


@njit
def silu_and_multiply_rows(x, out, first, last, size):
    """As `kernels.reference.activation.silu_and_mul`, for rows first..last of x: float32 [rows, 2 * size]."""
    for row in range(first, last):
        gate = x + row * size * 8
        silu_and_multiply(gate, gate + size * 4, out + row * size * 4, size // LANES)


@njit
def quantise_rows(x, out, factors, first, last, size):
    """Rounds rows to 16-bit integers, with a scale for each group of 32: within 2^-16 of the group's largest element.

    x: float32 [rows, size]; out: int16 [rows, size]; factors: [rows, size / 32, 4] of 32 bits, as `round_groups` has
    them
    """
    groups = size // GROUP
    for row in range(first, last):
        round_groups(x + row * size * 4, out + row * size * 2, factors + row * groups * 16, groups)


@njit
def quantise_rows_to_bytes(x, out, factors, first, last, size):
    """As `quantise_rows`, to unsigned 8-bit integers: within a 508th of the span from the smallest of the group to its
    largest, or to zero.

    out: uint8 [rows, size]; factors: as `round_groups_to_bytes` has them
    """
    groups = size // GROUP
    for row in range(first, last):
        round_groups_to_bytes(x + row * size * 4, out + row * size, factors + row * groups * 16, groups)


@njit
def round_rows(x, out, first, last, size):
    """out = x, rounded to bfloat16, for rows first..last of x: float32 [rows, size]."""
    for row in range(first, last):
        wide, narrow = floats(x + row * size * 4, size), words(out + row * size * 2, size)
        for i in range(size):
            narrow[i] = to_bfloat16_bits(wide[i])


@njit
def fill_rows(source, out, first, last, size, adds):
    """Copies the same `size` float32 (a bias) into rows of out, or adds them."""
    values = floats(source, size)
    for row in range(first, last):
        target = floats(out + row * size * 4, size)
        for i in range(size):
            target[i] = target[i] + values[i] if adds != 0 else values[i]


@njit
def copy_rows(source, out, first, last, size):
    """out[row] = source[row], `size` float32 each."""
    for row in range(first, last):
        values, target = floats(source + row * size * 4, size), floats(out + row * size * 4, size)
        for i in range(size):
            target[i] = values[i]


@njit
def permute_rows(source, order, out, first, last, size):
    """out[row, i] = source[row, order[i]], `size` float32 each. order: int64 [size]"""
    places = integers(order, size)
    for row in range(first, last):
        values, target = floats(source + row * size * 4, size), floats(out + row * size * 4, size)
        for i in range(size):
            target[i] = values[places[i]]


@njit
def gather_rows(table, kind, indices, out, first, last, size):
    """out[row] = table[indices[row]] as float32. table: [any, size] of `kind`; indices: int64 [rows]"""
    rows = integers(indices, last)
    for row in range(first, last):
        target = floats(out + row * size * 4, size)
        if kind == FLOAT32:
            wide = floats(table + rows[row] * size * 4, size)
            for i in range(size):
                target[i] = wide[i]
        else:
            narrow = words(table + rows[row] * size * 2, size)
            if kind == BFLOAT16:
                for i in range(size):
                    target[i] = bfloat16_value(narrow[i])
            else:
                for i in range(size):
                    target[i] = float16_value(narrow[i])
