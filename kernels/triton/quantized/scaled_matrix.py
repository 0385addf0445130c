"""A matrix of int8 or FP8 with scales, whose products are with rows that are quantised as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.triton.quantized.matrix import QuantizedMatrix, make_matrix

FORMATS = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class ScaledMatrix:
    """values: [num_outputs, num_inputs] int8 or float8_e4m3fn

    scales: [1, 1], [num_outputs, 1], or of blocks of 128 x 128, [cdiv(num_outputs, 128), cdiv(num_inputs, 128)] float32
    """

    values: Tensor
    scales: Tensor

    @property
    def is_blocked(self) -> bool:
        return self.scales.shape[1] > 1 or self.scales.shape[0] not in (1, len(self.values))

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Those rows of the matrix in float32."""
        values = self.values.float()
        if self.is_blocked:
            spread = self.scales.repeat_interleave(128, 0)[: len(values)].repeat_interleave(128, 1)
            return (values * spread[:, : values.shape[1]])[rows]
        return (values * self.scales)[rows]


def make_scaled_matrix(values: Tensor, scales: Tensor) -> ScaledMatrix:
    """ValueError for what does not fit together, and for numbers that are none. Scales as of `ScaledMatrix`, or fewer
    dimensions: a number, or one for each output.
    """
    if values.dim() != 2 or values.dtype not in FORMATS:
        raise ValueError(
            f"values of {values.dtype}, {tuple(values.shape)}; a matrix of int8 or float8_e4m3fn is wanted"
        )
    num_outputs, num_inputs = values.shape
    scales = scales.float()
    scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
    blocks = -(-num_outputs // 128), -(-num_inputs // 128)
    if tuple(scales.shape) not in {(1, 1), (num_outputs, 1), blocks}:
        raise ValueError(
            f"scales have shape {tuple(scales.shape)}; a matrix of {num_outputs} x {num_inputs} has one, "
            f"one for each output, or {blocks} for its blocks of 128 x 128"
        )
    if not bool(scales.isfinite().all()) or not bool(values.float().isfinite().all()):
        raise ValueError("weights or their scales are infinite or no numbers")
    return ScaledMatrix(values.contiguous(), scales.contiguous())


def with_rows_as_they_are(matrix: ScaledMatrix) -> QuantizedMatrix:
    """The same numbers for products with rows of floats: where a chip has none of FP8, or rows are not to be rounded.

    ValueError for blocks that do not divide the inputs.
    """
    num_outputs, num_inputs = matrix.values.shape
    is_float = matrix.values.dtype == torch.float8_e4m3fn
    codes = matrix.values.view(torch.uint8) if is_float else (matrix.values.short() + 128).to(torch.uint8)
    scales = matrix.scales
    if matrix.is_blocked:
        scales = scales.repeat_interleave(128, 0)[:num_outputs]
    return make_matrix(
        codes,
        scales.expand(num_outputs, -1),
        bits=8,
        group_size=128 if matrix.is_blocked else num_inputs,
        values="e4m3" if is_float else "integer",
    )
