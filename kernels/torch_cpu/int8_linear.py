"""Products with a matrix kept as int8 and one scale per output channel. Activations are not quantised.

Bound: an element of the matrix is off by at most half a step, which is the largest magnitude in its row / 254 (and
1/256 of that more), so an output by at most half a step times the sum of the magnitudes of its input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCRATCH_ELEMENTS = 1 << 21  # dequantised at a time: they fit into a last-level cache, and take few calls


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [out_features, in_features], finite floats.

    Returns values: [out_features, in_features] int8 in -127..127, and scales: [out_features] float32, with
    weight ~ values * scales[:, None]. A scale is a bfloat16 number, so that kernels in that dtype lose nothing more.
    """
    weight = weight.float()
    scales = (weight.abs().amax(dim=1) / 127).to(torch.bfloat16).float()
    scales = torch.where(scales > 0, scales, 1.0)  # a row of zeros
    values = torch.round(weight / scales[:, None]).clamp_(-127, 127).to(torch.int8)
    return values, scales


def dequantize_int8(values: Tensor, scales: Tensor) -> Tensor:
    """The matrix that `int8_linear` multiplies by, in scales' dtype."""
    return values * scales[:, None]


def int8_linear(x: Tensor, values: Tensor, scales: Tensor, scratch: Tensor) -> Tensor:
    """x @ dequantize_int8(values, scales).T for every dtype and size; some rows of the matrix at a time fill `scratch`.

    x: [num_rows, in_features]; values: [out_features, in_features] int8
    scales: [out_features] in x's dtype, but in float32 for float16, whose range small ones would leave
    scratch: [>= in_features] in x's dtype, overwritten; its size is what is dequantised at a time
    """
    num_outputs, num_inputs = values.shape
    step = max(1, scratch.numel() // num_inputs)
    if num_outputs <= step:
        return _product(x, values, scales, scratch)
    out = x.new_empty(x.shape[0], num_outputs)
    for start in range(0, num_outputs, step):
        rows = slice(start, start + step)
        out[:, rows] = _product(x, values[rows], scales[rows], scratch)
    return out


def int8_linear_few_rows(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """As `int8_linear`, for a few rows of bfloat16, by torch's own kernel, which never writes the dequantised matrix.

    x: [num_rows, in_features] bfloat16; scales: [out_features] bfloat16
    """
    return torch._weight_int8pack_mm(x, values, scales)


def _product(x: Tensor, values: Tensor, scales: Tensor, scratch: Tensor) -> Tensor:
    floats = scratch[: values.numel()].view(values.shape)
    if x.dtype == torch.float16:  # it has no range for sums that are not scaled yet
        return F.linear(x, torch.mul(values, scales[:, None], out=floats))
    return F.linear(x, floats.copy_(values)).mul_(scales)
