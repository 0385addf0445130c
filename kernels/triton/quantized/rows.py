"""Activations as int8 or FP8, each row or each 128 inputs of it by a scale of their own, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.quantized import LARGEST
from kernels.triton.compat import to_float8

GROUP = 128
_COLUMNS = 2048  # of a row that one turn of the loop reads


def quantize_rows(x: Tensor, dtype: torch.dtype, *, in_groups: bool = False) -> tuple[Tensor, Tensor]:
    """As `kernels.reference.quantized.quantize_rows`: (values in `dtype`, scales float32 [num_rows, 1]).

    in_groups: scales are [num_rows, cdiv(num_inputs, 128)], of 128 inputs each
    """
    num_rows, num_inputs = x.shape
    values = torch.empty(num_rows, num_inputs, dtype=dtype, device=x.device)
    num_groups = triton.cdiv(num_inputs, GROUP) if in_groups else 1
    scales = torch.empty(num_rows, num_groups, dtype=torch.float32, device=x.device)
    if num_rows:
        quantize_rows_kernel[(num_rows, num_groups)](
            x.contiguous(), values, scales, num_inputs, num_groups,
            LARGEST=LARGEST[dtype], LENGTH=GROUP if in_groups else num_inputs,
            COLUMNS=GROUP if in_groups else min(_COLUMNS, triton.next_power_of_2(num_inputs)), num_warps=4,
        )  # fmt: skip
    return values, scales


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    num_inputs,
    num_groups,
    LARGEST: tl.constexpr,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # grid: [num_rows, num_groups]; one program quantises LENGTH inputs of a row: it reads them again, from the cache
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = row * num_inputs + group * LENGTH
    left = tl.minimum(LENGTH, num_inputs - group * LENGTH)
    columns = tl.arange(0, COLUMNS)
    largest = tl.zeros([COLUMNS], tl.float32)
    is_wrong = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, LENGTH, COLUMNS):
        x = tl.load(x_ptr + first + start + columns, mask=start + columns < left, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        is_wrong |= (x != x).to(tl.int32)
    scale = tl.maximum(tl.max(largest, 0) / LARGEST, 1.1754943508222875e-38)
    scale = tl.where(tl.max(is_wrong, 0) > 0, float("nan"), scale)  # a row that is no number stays none
    tl.store(scales_ptr + row * num_groups + group, scale)
    for start in range(0, LENGTH, COLUMNS):
        is_column = start + columns < left
        x = tl.load(x_ptr + first + start + columns, mask=is_column, other=0.0).to(tl.float32) / scale
        x = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -LARGEST), LARGEST)
        if values_ptr.dtype.element_ty == tl.int8:
            values = ((x + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2**23: what is left of it is rounded to even
        else:
            values = to_float8(x)
        tl.store(values_ptr + first + start + columns, values, mask=is_column)
