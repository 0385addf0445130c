"""Products of floats with a quantised matrix (W4A16 and its kin), of any number of rows.

The matrix is the tensor cores' first operand, whose tiles are made in registers out of packed words; the rows are the
second one, whose tiles may be as narrow as a decoding batch. Few rows leave most of the chip idle, so that several
programs share the inputs of a tile (split-K): each writes its part, and a second kernel adds them up in order. So the
result is the same in every run, and where the config is the same, a row's result is the same among any rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.configs import QuantizedConfig, chip_of, quantized_config
from kernels.triton.quantized.matrix import QuantizedMatrix
from kernels.triton.quantized.tile import STEP, Operands, multiply_tile

COMBINED = 1024  # outputs that one program adds up
_LEAST_STEPS = 2  # of a split: less work than that is not worth a sum


def quantized_linear(
    x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None = None, *, config: QuantizedConfig | None = None
) -> Tensor:
    """x @ matrix.dense().T + bias, summed in float32.

    x: [num_rows, num_inputs] bfloat16, float16 or float32
    config: tile sizes; by default those for this many rows. With a given one, a row's result depends on the row alone
    """
    num_rows, num_inputs = x.shape
    assert num_inputs == matrix.num_inputs, f"{num_inputs} inputs for a matrix {matrix.shape}"
    num_outputs = matrix.num_outputs
    out = x.new_empty(num_rows, num_outputs)
    if not num_rows:
        return out
    x = x.contiguous() if matrix.order is None else x.index_select(1, matrix.order)
    config = config or quantized_config(num_rows, x.dtype, chip=chip_of(x.device))
    splits = num_splits(num_outputs, num_inputs, config)
    operands = Operands.of(matrix)
    sums = x.new_empty(splits, num_rows, num_outputs, dtype=torch.float32) if splits > 1 else out
    grid = (triton.cdiv(num_rows, config.rows), triton.cdiv(num_outputs, config.columns), splits)
    quantized_kernel[grid](
        x,
        *operands.tensors,
        x if bias is None else bias,
        sums,
        num_rows,
        num_inputs,
        *operands.sizes,
        **operands.constants,
        HAS_BIAS=bias is not None and splits == 1,
        IS_FULL=num_outputs % config.columns == 0 and operands.fills_steps,
        HAS_STEPS=num_inputs % STEP == 0,
        ROWS=config.rows,
        COLUMNS=config.columns,
        STEP=STEP,
        SPLITS=splits,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    if splits > 1:
        add_splits(sums, bias, out)
    return out


def add_splits(sums: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Adds the sums of programs that shared the inputs, in order, and the bias. sums: [splits, *out.shape] float32"""
    combine_splits_kernel[(triton.cdiv(out.numel(), COMBINED),)](
        sums, out if bias is None else bias, out, out.numel(), out.shape[1],
        SPLITS=len(sums), HAS_BIAS=bias is not None, SIZE=COMBINED, num_warps=4,
    )  # fmt: skip


def num_splits(num_outputs: int, num_inputs: int, config: QuantizedConfig) -> int:
    """Programs that share the inputs of a tile: whatever the number of rows, for their sums must not depend on it."""
    num_tiles, num_steps = triton.cdiv(num_outputs, config.columns), triton.cdiv(num_inputs, STEP)
    wanted = min(config.programs // num_tiles, num_steps // _LEAST_STEPS)
    steps = triton.cdiv(num_steps, max(1, wanted))
    return triton.cdiv(num_steps, steps)


@triton.jit(do_not_specialize=["num_rows"])
def quantized_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    offsets_ptr,
    channels_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_inputs,
    num_outputs,
    num_units,
    stride_block,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_FULL: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # grid: [cdiv(num_rows, ROWS), cdiv(num_outputs, COLUMNS), SPLITS]; one program multiplies a share of the inputs of
    #   ROWS rows by COLUMNS columns
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < num_outputs
    split = tl.program_id(2)
    num_steps = tl.cdiv(num_inputs, STEP)
    per_split = tl.cdiv(num_steps, SPLITS)
    acc = multiply_tile(
        x_ptr + rows.to(tl.int64) * num_inputs,
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
        split * per_split,
        tl.minimum(split * per_split + per_split, num_steps),
        BITS,
        GROUP,
        KIND,
        VALUES,
        HAS_OFFSETS,
        IS_FULL,
        HAS_STEPS,
        ROWS,
        COLUMNS,
        STEP,
        STAGES,
    )
    if HAS_CHANNELS:
        acc *= tl.load(channels_ptr + columns, mask=is_column, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
    targets = out_ptr + (split * num_rows + rows).to(tl.int64)[None, :] * num_outputs + columns[:, None]
    tl.store(targets, acc.to(out_ptr.dtype.element_ty), mask=is_row[None, :] & is_column[:, None])


@triton.jit(do_not_specialize=["size"])
def combine_splits_kernel(
    sums_ptr,
    bias_ptr,
    out_ptr,
    size,
    num_outputs,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SIZE: tl.constexpr,
):
    # grid: [cdiv(size, SIZE)]; one program adds up the splits of SIZE elements, the first inputs first
    elements = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    is_element = elements < size
    total = tl.zeros([SIZE], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums_ptr + split * size.to(tl.int64) + elements, mask=is_element, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + elements % num_outputs, mask=is_element, other=0.0).to(tl.float32)
    tl.store(out_ptr + elements, total.to(out_ptr.dtype.element_ty), mask=is_element)
