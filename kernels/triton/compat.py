"""Operations that a GPU and Triton's interpreter would compute differently, for kernels that run on both.

The interpreter computes in numpy, which has no bfloat16: products of bfloat16 tiles would silently be wrong there, so
kernels load into float32 and multiply with `dot`. Nothing here touches a driver: importing needs no GPU.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Read once: `triton.jit` and triton's own library look at the same variable when they are imported.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E = tl.constexpr(1.4426950408889634)


def next_power_of_2(number: int) -> int:
    return 1 << (max(1, number) - 1).bit_length()


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32. `a` is rounded to b's dtype, which decides the tensor core instruction."""
    if INTERPRET:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif b.dtype == tl.float32:
        acc = tl.dot(a.to(tl.float32), b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a.to(b.dtype), b, acc)
    return acc


@triton.jit
def to_float8(x):
    """e4m3, rounded to the nearest as a GPU does; the interpreter would cut off. x: float32 within its range"""
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        subnormal = (x + 24576.0) - 24576.0  # 1.5 * 2**14, where numbers are 2**-9 apart
        x = tl.where(tl.abs(x) < 0.015625, subnormal, rounded)
    return x.to(tl.float8e4nv)


@triton.jit
def tanh(x):
    """Exact at both infinities, where the quotient is 0 or 2."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
