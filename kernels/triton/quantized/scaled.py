"""Products of two quantised operands, int8 by int8 or FP8 by FP8: rows are quantised on the way in.

Scales are applied to sums in float32: once, or after each 128 inputs where the matrix has scales of blocks. FP8 sums
are moved to float32 after each 128 inputs in any case: Hopper's tensor cores keep some 14 bits of them (DeepSeek-V3
technical report, section 3.3.2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.compat import INTERPRET
from kernels.triton.configs import QuantizedConfig, chip_of, scaled_config
from kernels.triton.quantized.linear import add_splits, num_splits
from kernels.triton.quantized.rows import quantize_rows
from kernels.triton.quantized.scaled_matrix import ScaledMatrix

STEP = 128


def scaled_linear(
    x: Tensor, matrix: ScaledMatrix, bias: Tensor | None = None, *, config: QuantizedConfig | None = None
) -> Tensor:
    """quantize_rows(x) @ matrix.dense().T + bias, in x's dtype: as `kernels.reference.quantized.scaled_linear`.

    x: [num_rows, num_inputs]; its rows are quantised to the matrix's format, in groups of 128 where that has blocks
    config: tile sizes; by default those for this many rows. With a given one, a row's result depends on the row alone
    """
    (num_rows, num_inputs), num_outputs = x.shape, len(matrix.values)
    assert num_inputs == matrix.values.shape[1], f"{num_inputs} inputs for a matrix {tuple(matrix.values.shape)}"
    out = x.new_empty(num_rows, num_outputs)
    if not num_rows:
        return out
    values, row_scales = quantize_rows(x, matrix.values.dtype, in_groups=matrix.is_blocked)
    config = config or scaled_config(num_rows, chip=chip_of(x.device))
    splits = num_splits(num_outputs, num_inputs, config)
    sums = x.new_empty(splits, num_rows, num_outputs, dtype=torch.float32) if splits > 1 else out
    grid = (triton.cdiv(num_rows, config.rows), triton.cdiv(num_outputs, config.columns), splits)
    scaled_kernel[grid](
        values,
        matrix.values,
        row_scales,
        matrix.scales,
        x if bias is None else bias,
        sums,
        num_rows,
        num_outputs,
        num_inputs,
        IS_BLOCKED=matrix.is_blocked,
        IS_ONE_SCALE=matrix.scales.numel() == 1,
        HAS_BIAS=bias is not None and splits == 1,
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


@triton.jit(do_not_specialize=["num_rows"])
def scaled_kernel(
    x_ptr,
    values_ptr,
    row_scales_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    IS_BLOCKED: tl.constexpr,
    IS_ONE_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # grid: [cdiv(num_rows, ROWS), cdiv(num_outputs, COLUMNS), SPLITS]; one program multiplies a share of the inputs of
    #   ROWS rows by COLUMNS columns, which are the tensor cores' first operand
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < num_outputs
    split = tl.program_id(2)
    steps = tl.arange(0, STEP)
    num_steps = tl.cdiv(num_inputs, STEP)
    per_split = tl.cdiv(num_steps, SPLITS)
    sources = x_ptr + rows.to(tl.int64)[None, :] * num_inputs + steps[:, None]
    weights = values_ptr + columns.to(tl.int64)[:, None] * num_inputs + steps[None, :]
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    for step in tl.range(split * per_split, tl.minimum(split * per_split + per_split, num_steps), num_stages=STAGES):
        start = step * STEP
        is_source, is_weight = is_row[None, :], is_column[:, None]
        if not HAS_STEPS:
            is_step = start + steps < num_inputs
            is_source, is_weight = is_source & is_step[:, None], is_weight & is_step[None, :]
        x = tl.load(sources + start, mask=is_source, other=0.0)
        w = tl.load(weights + start, mask=is_weight, other=0.0)
        part = _dot(w, x)
        if IS_BLOCKED:
            row_scales = tl.load(row_scales_ptr + rows * num_steps + step, mask=is_row, other=0.0)
            scales = tl.load(scales_ptr + columns // 128 * num_steps + step, mask=is_column, other=0.0)
            part *= scales[:, None] * row_scales[None, :]
        acc += part
    if not IS_BLOCKED:
        row_scales = tl.load(row_scales_ptr + rows, mask=is_row, other=0.0)
        scales = tl.load(scales_ptr + (columns * 0 if IS_ONE_SCALE else columns), mask=is_column, other=0.0)
        acc *= scales[:, None] * row_scales[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
    targets = out_ptr + (split * num_rows + rows).to(tl.int64)[None, :] * num_outputs + columns[:, None]
    tl.store(targets, acc.to(out_ptr.dtype.element_ty), mask=is_row[None, :] & is_column[:, None])


@triton.jit
def _dot(a, b):
    """a @ b as float32, exactly for int8, of 128 inputs."""
    if a.dtype == tl.int8:
        product = tl.dot(a, b).to(tl.float32)
    elif INTERPRET:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b)
    return product
