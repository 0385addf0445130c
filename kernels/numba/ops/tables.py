"""Rows of packed matrices as floats: what a token's embedding is, where it has no table of plain floats."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit, types

from kernels.numba.core.formats import (
    BFLOAT16,
    FLOAT16,
    GROUP,
    INTEGERS,
    NAMES,
    SUPER_GROUP,
    IntegerFormat,
)
from kernels.numba.core.lanes import LANES
from kernels.numba.core.memory import bfloat16_value, flags, float16_value, floats, words
from kernels.numba.kernel_cache import address_of, by_address, kernel, named

_SIGNATURE = types.void(*[types.int64] * 5)
call_row = by_address(_SIGNATURE)


@cache
def row_kernel(kind: int):
    """The kernel that writes a row of a matrix of integers, or of floats of 16 bits: (values, scales, depth, row, out).

    values, scales: addresses of those of a PackedMatrix; out: float32 [depth], the very numbers of `packing.unpack`
    """
    if kind in (FLOAT16, BFLOAT16):
        return _row_of_floats(kind)
    weights = INTEGERS[kind]
    read_level, read_factor = _level_reader(weights), _factor_reader(weights)
    group_bytes, scale_bytes, per_scale = weights.group_bytes, weights.scale_bytes, weights.per_scale
    num_scales, has_offsets, has_zeros = weights.num_scales, weights.has_offsets, weights.has_zeros

    def read_row(values, scales, depth, row, out):
        panel, column, groups = row // LANES, row % LANES, depth // GROUP
        values, scales = values + panel * groups * group_bytes, scales + panel * groups * scale_bytes
        target = floats(out, depth)
        for group in range(groups):
            base = values + group * group_bytes
            for part in range(num_scales):
                scale = read_factor(scales, group, part, column)
                offset = np.float32(0.0)
                if has_offsets:
                    offset = read_factor(scales, group, num_scales + part, column)
                    offset = -offset * scale if has_zeros else offset
                for i in range(part * per_scale, (part + 1) * per_scale):
                    value = read_level(base, i, column) * scale
                    target[group * GROUP + i] = value + offset if has_offsets else value

    return kernel(_SIGNATURE)(named(read_row, f"read row of {weights.name}"))


def _row_of_floats(kind: int):
    """Of those the elements of bfloat16 lie in pairs of depths."""
    is_bfloat16, depths = kind == BFLOAT16, 2 if kind == BFLOAT16 else 1

    def read_row(values, scales, depth, row, out):
        panel, column = row // LANES, row % LANES
        source, target = words(values + panel * depth * LANES * 2, depth * LANES), floats(out, depth)
        for i in range(depth):
            bits = source[(i // depths * LANES + column) * depths + i % depths]
            target[i] = bfloat16_value(bits) if is_bfloat16 else float16_value(bits)

    return kernel(_SIGNATURE)(named(read_row, f"read row of {NAMES[kind]}"))


def row_address(kind: int) -> int:
    """Of the `row_kernel`, as operations name it."""
    return address_of(row_kernel(kind))


def _level_reader(weights: IntegerFormat):
    """(address of a group, element, column) -> what is multiplied, float32."""
    depths, planes, table = weights.depths, weights.planes if weights.bits < 8 else (), weights.table or (0,)
    lane_bits, has_table, zero = 32 // depths, bool(weights.table), weights.zero

    def read_byte(base, i, column):
        byte = flags(base + (i // depths * LANES + column) * depths + i % depths, 1)[0]
        return np.float32(np.int8(byte))

    def read_planes(base, i, column):
        step, lane, level = i // depths, i % depths, 0
        for bits, place in planes:
            shift = bits * (step % (lane_bits // bits)) + lane_bits * lane
            address = base + (step // (lane_bits // bits) * LANES + column) * 4 + shift // 8
            level |= ((np.int64(flags(address, 1)[0]) >> (shift % 8)) & ((1 << bits) - 1)) << place
            base += GROUP * LANES * bits // 8
        return np.float32(table[level] if has_table else level - zero)

    return njit(named(read_byte if weights.bits == 8 else read_planes, f"read level of {weights.name}"))


def _factor_reader(weights: IntegerFormat):
    """(address of a panel's scales, group, factor, column) -> a scale or an offset, float32."""
    scale_bytes, num_factors, num_scales = weights.scale_bytes, weights.num_factors, weights.num_scales
    is_bfloat16, groups = weights.scales == "bfloat16", SUPER_GROUP // GROUP
    skipped = 2 * LANES * (1 + weights.has_offsets)

    def read_float(scales, group, factor, column):
        return floats(scales + group * scale_bytes + 4 * (factor * LANES + column), 1)[0]

    def read_number(scales, group, factor, column):
        bits = words(scales + group * scale_bytes + 2 * (factor * LANES + column), 1)[0]
        return bfloat16_value(bits) if is_bfloat16 else float16_value(bits)

    def read_product(scales, group, factor, column):
        record = scales + group // groups * groups * scale_bytes
        common = float16_value(words(record + 2 * (factor // num_scales * LANES + column), 1)[0])
        small = flags(record + skipped + (group % groups * num_factors + factor) * LANES + column, 1)[0]
        return np.float32(np.int8(small)) * common

    read_one_level = read_float if weights.scales == "float32" else read_number
    read = read_product if weights.is_two_level else read_one_level
    return njit(named(read, f"read factor of {weights.name}"))
