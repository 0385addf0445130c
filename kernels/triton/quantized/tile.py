"""The loop that all products with packed words have in common: rows of floats by a tile of columns.

Groups of a whole step or more scale the sums, so that weights enter products exactly; smaller ones scale the weights,
which then are rounded to the dtype of the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.compat import dot
from kernels.triton.quantized.matrix import QuantizedMatrix
from kernels.triton.quantized.packing import unit_of
from kernels.triton.quantized.unpack import SCALES, VALUES, load_pairs, load_scales, weights_of

STEP = 128  # inputs: a whole number of units of any packing


class Operands(NamedTuple):
    """A matrix as kernels around `multiply_tile` take it.

    tensors: words, scales, offsets, channel scales and the table; what a matrix lacks, no kernel reads
    sizes: outputs, units of words, and words from block to block; constants: by their names in the kernels
    fills_steps: no step lies beyond the words
    """

    tensors: tuple[Tensor, ...]
    sizes: tuple[int, int, int]
    constants: dict[str, int | bool]
    fills_steps: bool

    @classmethod
    def of(cls, matrix: QuantizedMatrix) -> Operands:
        words, scales, num_units = matrix.words, matrix.scales, matrix.words.shape[0]
        others = (matrix.offsets, matrix.channel_scales, matrix.table)
        return cls(
            (words, scales, *(scales if one is None else one for one in others)),
            (matrix.num_outputs, num_units, words.stride(1)),
            {
                "BITS": matrix.bits,
                "GROUP": matrix.group_size,
                "KIND": SCALES[matrix.scale_kind],
                "VALUES": VALUES[matrix.values],
                "HAS_OFFSETS": matrix.offsets is not None,
                "HAS_CHANNELS": matrix.channel_scales is not None,
            },
            num_units * unit_of(matrix.bits) % STEP == 0,
        )


@triton.jit
def multiply_tile(
    row_ptrs,
    words_ptr,
    scales_ptr,
    offsets_ptr,
    table_ptr,
    is_row,
    columns,
    is_column,
    num_outputs,
    num_inputs,
    num_units,
    stride_block,
    first_step,
    last_step,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    IS_FULL: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The products of ROWS rows with COLUMNS columns over some steps of inputs, [COLUMNS, ROWS] float32.

    row_ptrs: [ROWS], where each row begins. GROUP: inputs; 0: one group, and the sum of all steps is scaled
    IS_FULL: no column and no step lies beyond the words; HAS_STEPS: nor beyond the inputs
    """
    GROUPS: tl.constexpr = STEP // GROUP if GROUP > 0 and GROUP < STEP else 1  # of a step
    BLOCKS: tl.constexpr = STEP * BITS // 128  # of a step
    UNITS: tl.constexpr = STEP // (128 if BITS % 2 == 1 else (64 if BITS == 2 or BITS == 6 else 128 // BITS))
    TYPE: tl.constexpr = row_ptrs.dtype.element_ty
    steps = tl.arange(0, STEP)
    groups = tl.arange(0, GROUPS)
    sources = row_ptrs[None, :] + steps[:, None]
    scales, zeros = load_scales(
        scales_ptr, columns[:, None] + groups[None, :] * 0, is_column[:, None], KIND, BITS, VALUES
    )
    offsets = scales
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    totals = tl.zeros([ROWS], tl.float32)
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        start = step * STEP
        is_source = is_row[None, :] if HAS_STEPS else is_row[None, :] & (start + steps < num_inputs)[:, None]
        x = tl.load(sources + start, mask=is_source, other=0.0)
        words = words_ptr + step * BLOCKS * stride_block
        units_left = num_units - step * UNITS
        pairs = load_pairs(words, columns, is_column, units_left, stride_block, BITS, COLUMNS, STEP, IS_FULL)
        if GROUP > 0:
            group = start // GROUP + groups
            is_group = is_column[:, None] & (group * GROUP < num_inputs)[None, :]
            places = columns[:, None] + group[None, :] * num_outputs
            scales, zeros = load_scales(scales_ptr, places, is_group, KIND, BITS, VALUES)
            if HAS_OFFSETS:
                offsets = tl.load(offsets_ptr + places, mask=is_group, other=0.0)
        weights = weights_of(pairs, zeros, scales, offsets, table_ptr, BITS, VALUES, GROUPS > 1, HAS_OFFSETS, TYPE)
        if GROUPS > 1 or GROUP == 0:
            acc = dot(weights, x, acc)
        else:
            acc += dot(weights, x, tl.zeros([COLUMNS, ROWS], tl.float32)) * scales
        if HAS_OFFSETS and GROUPS == 1:
            total = tl.sum(x.to(tl.float32), 0)
            if GROUP == 0:
                totals += total
            else:
                acc += offsets * total[None, :]
    if GROUP == 0:
        acc *= scales
        if HAS_OFFSETS:
            acc += tl.load(offsets_ptr + columns, mask=is_column, other=0.0)[:, None] * totals[None, :]
    return acc
