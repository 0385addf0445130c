"""8-bit codes of keys and values in Triton: see `kernels.reference.kv_codes`.

A cache's scales lie behind the codes of their head and block, so their strides are a quarter of the codes', which are
bytes: kernels take none for them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.compat import INTERPRET


def check_scales(k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> None:
    if k_scales is None or v_scales is None:
        assert k_scales is v_scales is None, "scales of both, or none"
        assert k_cache.itemsize > 1, f"codes of {k_cache.dtype} without scales"
        return
    assert k_cache.itemsize == v_cache.itemsize == 1, f"scales of {k_cache.dtype}"
    block, head = (stride // 4 for stride in k_cache.stride()[:2])
    for scales in (k_scales, v_scales):
        assert scales.shape == k_cache.shape[:3], f"scales {tuple(scales.shape)} of codes {tuple(k_cache.shape)}"
        assert scales.stride() == (block, head, 1), f"scales {scales.stride()} beside codes {k_cache.stride()}"


@triton.jit
def encode(x, AXIS: tl.constexpr, DTYPE: tl.constexpr):
    """(codes, scales) of each row along the axis, in float32. What is no element of the row is 0.

    DTYPE: of the codes, tl.int8 or tl.float8e4nv
    """
    STEPS: tl.constexpr = 127.0 if tl.int8 == DTYPE else 448.0
    sizes = tl.abs(x)
    is_number = sizes < float("inf")  # and so not NaN
    largest = tl.max(tl.where(is_number, sizes, 0.0), AXIS)
    is_finite = tl.min(is_number.to(tl.int32), AXIS) == 1
    is_some = is_finite & (largest > 1e-30)
    inverse = tl.where(is_some, STEPS / tl.where(is_some, largest, 1.0), 0.0)
    scales = tl.where(is_finite, tl.where(is_some, largest / STEPS, 0.0), float("nan"))
    if AXIS == 1:
        inverse = inverse[:, None]
    scaled = tl.where(is_number, x, 0.0) * inverse
    if tl.int8 == DTYPE:
        scaled = (scaled + 12582912.0) - 12582912.0  # 1.5 * 2^23: the nearest integer, to even between two
    elif INTERPRET:
        scaled = round_to_e4m3(scaled)
    return scaled.to(DTYPE), scales


@triton.jit
def round_to_e4m3(x):
    """To the nearest e4m3, to even between two, as float32: the interpreter's own conversion loses a carry."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (x + 24576.0) - 24576.0  # 1.5 * 2^14: steps of 2^-9
    return tl.where(tl.abs(x) < 0.015625, small, rounded)


@triton.jit
def widen(codes, dtype: tl.constexpr):
    """The codes as numbers of a wider type, exactly."""
    return codes.to(tl.float32 if INTERPRET else dtype)
