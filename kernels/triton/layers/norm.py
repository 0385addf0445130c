"""Root-mean-square normalisation (Zhang and Sennrich, 2019), alone and after a residual addition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.compat import next_power_of_2


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `kernels.reference.norm.rms_norm`, in float32.

    x: heads of a wider tensor included
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, out, None, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `kernels.reference.norm.add_rms_norm`, in float32.

    The sum is rounded to x's dtype before it is normalised, as if it had been stored in between.
    """
    assert x.shape == residual.shape, f"{tuple(x.shape)} onto {tuple(residual.shape)}"
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(x, residual, weight, out, total, eps)
    return out, total


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None, eps: float) -> None:
    assert weight.shape == x.shape[-1:], f"a weight of {tuple(weight.shape)} for rows of {x.shape[-1]}"
    rows = _as_heads(x)
    addend = rows if residual is None else _as_heads(residual)
    num_tokens, num_heads, dim = rows.shape
    if not x.numel():
        return
    padded = next_power_of_2(dim)
    rms_norm_kernel[(num_tokens, num_heads)](
        rows,
        addend,
        weight,
        out,
        out if total is None else total,
        eps,
        *rows.stride()[:2],
        *addend.stride()[:2],
        num_heads,
        DIM=dim,
        PADDED=padded,
        HAS_RESIDUAL=residual is not None,
        num_warps=min(16, max(1, padded // 512)),
    )


def _as_heads(x: Tensor) -> Tensor:
    """[num_tokens, num_heads, dim], a view if at all possible."""
    heads = x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
    return heads if heads.stride(2) == 1 else heads.contiguous()


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    eps,
    stride_token,
    stride_head,
    residual_stride_token,
    residual_stride_head,
    num_heads,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    # grid: [num_tokens, num_heads]; one program normalises one row
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, PADDED)
    is_dim = dims < DIM
    target = (token * num_heads + head) * DIM + dims
    x = tl.load(x_ptr + token * stride_token + head * stride_head + dims, mask=is_dim, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        source = token * residual_stride_token + head * residual_stride_head + dims
        x += tl.load(residual_ptr + source, mask=is_dim, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + target, total, mask=is_dim)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / DIM + eps) * weight
    tl.store(out_ptr + target, normed.to(out_ptr.dtype.element_ty), mask=is_dim)
