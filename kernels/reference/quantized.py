"""Quantised matrices and rows, defined in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # of the formats of rows


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """The matrix that codes stand for, [num_outputs, num_inputs] float32: (code - zero) * scale + offset.

    codes: [num_outputs, num_inputs] integers; scales, zeros, offsets: [num_outputs, num_groups], of inputs that lie
    side by side; table: [16], values that codes are numbers of, instead of being integers themselves
    """
    groups = codes.reshape(len(codes), scales.shape[1], codes.shape[1] // scales.shape[1])
    values = groups.float() if table is None else table.float()[groups.long()]
    if zeros is not None:
        values = values - zeros.float()[:, :, None]
    values = values * scales.float()[:, :, None]
    if offsets is not None:
        values = values + offsets.float()[:, :, None]
    return values.flatten(1)


def round_to_groups(
    weight: Tensor, *, bits: int, group_size: int, is_symmetric: bool, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest codes, scales and zeros, of which `dequantize` makes about `weight` again.

    weight: [num_outputs, num_inputs] finite floats. Returns (codes uint8 [num_outputs, num_inputs], scales in
    scale_dtype and zeros uint8, [num_outputs, num_groups] each). Symmetric: the zero is 2**(bits - 1), and the largest
    magnitude has the code furthest from it; else the least element has code 0 and the largest 2**bits - 1, and zero,
    which is a code as well, lies between them.
    Bound: half a step, and as much again at the ends of an asymmetric group, whose zero was rounded to a code.
    """
    groups = weight.float().reshape(len(weight), -1, group_size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    most, half = 2**bits - 1, 2 ** (bits - 1)
    scales = torch.maximum(-low, high) / (half - 1) if is_symmetric else high / most - low / most
    tiny = torch.finfo(scale_dtype).tiny
    scales = scales.to(scale_dtype).clamp(min=tiny)  # a group of zeros, too
    wide = scales.float()
    zeros = torch.full_like(wide, half) if is_symmetric else (-low / wide).round().clamp(0, most)
    codes = ((groups / wide[:, :, None]).round() + zeros[:, :, None]).clamp_(0, most).to(torch.uint8)
    return codes.flatten(1), scales, zeros.to(torch.uint8)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row by a scale of its own: (values in `dtype`, int8 or e4m3, as x; scales float32 [num_rows]).

    The largest magnitude of a row becomes the largest number that the format has; integers are rounded to even.
    """
    largest = LARGEST[dtype]
    scales = (x.float().abs().amax(1) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    values = x.float() / scales[:, None]
    if dtype == torch.int8:
        values = values.round()
    return values.clamp(-largest, largest).to(dtype), scales


def scaled_linear(
    values: Tensor, row_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The product of quantised rows and a quantised matrix, [num_rows, num_outputs] float64.

    values: [num_rows, num_inputs] and row_scales: [num_rows] of `quantize_rows`; weight: [num_outputs, num_inputs]
    scales: of blocks of it, [blocks of outputs, blocks of inputs], where [1, 1] is one for the whole matrix and
    [num_outputs, 1] one for each output
    """
    (num_outputs, num_inputs), (rows, columns) = weight.shape, scales.shape
    sizes = block_size(num_outputs, rows), block_size(num_inputs, columns)
    spread = scales.double().repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)
    dense = weight.double() * spread[:num_outputs, :num_inputs]
    return F.linear(values.double() * row_scales.double()[:, None], dense, None if bias is None else bias.double())


def block_size(length: int, num_blocks: int) -> int:
    """Of blocks that are all 128 long but for the last, or one for all, or one for each."""
    if num_blocks in (1, length):
        return length // num_blocks
    return 128
