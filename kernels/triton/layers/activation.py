"""Gated activations over the two halves of a merged gate and up projection."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.compat import tanh

_COLUMNS = 1024  # per program
_SILU, _GELU, _GELU_TANH = 0, 1, 2


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """As `kernels.reference.activation.silu_and_mul`, in float32."""
    return _launch(gate_up, _SILU)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """As `kernels.reference.activation.gelu_and_mul`, in float32."""
    return _launch(gate_up, _GELU)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """As `kernels.reference.activation.gelu_tanh_and_mul`, in float32."""
    return _launch(gate_up, _GELU_TANH)


def _launch(gate_up: Tensor, activation: int) -> Tensor:
    assert gate_up.shape[-1] % 2 == 0, f"no two halves: {tuple(gate_up.shape)}"
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], size)
    rows = gate_up.reshape(-1, 2 * size)
    if out.numel():
        grid = (rows.shape[0], triton.cdiv(size, _COLUMNS))
        gated_kernel[grid](rows, out, size, rows.stride(0), ACTIVATION=activation, COLUMNS=_COLUMNS, num_warps=4)
    return out


@triton.jit
def gated_kernel(gate_up_ptr, out_ptr, size, stride_row, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr):
    # grid: [num_rows, cdiv(size, COLUMNS)]; one program computes COLUMNS values of one row
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < size
    gate = tl.load(gate_up_ptr + row * stride_row + columns, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride_row + size + columns, mask=is_column, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        gate = gate * tl.sigmoid(gate)
    elif ACTIVATION == 1:
        gate = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        gate = gate * 0.5 * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    tl.store(out_ptr + row * size + columns, (gate * up).to(out_ptr.dtype.element_ty), mask=is_column)
