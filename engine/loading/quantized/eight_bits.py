"""Matrices of whole numbers or small floats of 8 bits, with scales: of the matrix, of each row, of groups, of blocks.

weight: [outputs, inputs] int8 or float8_e4m3fn; scale: one number, [outputs, 1], [outputs, groups] along the inputs, or
[outputs / height, inputs / width] of blocks. weight * scale is what it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.loading.quantized.matrix_header import (
    FLOAT_TYPES,
    Headers,
    MatrixHeader,
    Tensors,
    expect_dimensions,
    expect_dtype,
    expect_finite,
    expect_shape,
    fits_chunks,
    group_label,
    kept_integers,
    num_groups,
    why_not_chunks,
)
from engine.quantization.stored_integers import ScaledFloats, StoredFloats, StoredIntegers, even_groups
from engine.quantization.stored_levels import StoredLevels
from kernels.numba.core.formats import FLOAT8 as FLOAT8_KIND
from kernels.numba.core.formats import GROUP

FLOAT8, FLOAT8_WIDE = "F8_E4M3", "F8_E5M2"
EXPONENTS = ("U8", "F8_E8M0")  # of scales that are powers of two
WHY_WIDE = "no compiled kernel multiplies 8-bit floats of five exponent bits"
Block = tuple[int, int]  # (outputs, inputs)


@dataclass(frozen=True, slots=True)
class ScaleLayout:
    """block: of weights that share a scale; scale number [n // height, k // width] is that of weight [n, k]."""

    shape: tuple[int, int]
    block: Block

    @property
    def label(self) -> str:
        height, width = self.block
        if self.block == self.shape:
            return "one scale"
        if height == 1:
            return group_label(self.shape[1], width)
        return f"blocks of {height} x {width}"

    def rows_of(self, scales: Tensor, start: int, stop: int, *, step: int = 1) -> Tensor:
        """Of each `step` columns of some rows, [n, depth / step], of scales, [rows of blocks, columns of blocks]."""
        height, width = self.block
        rows = scales[torch.arange(start, stop, device="cpu") // height]
        columns = torch.arange(0, self.shape[1], step, device="cpu")
        return rows.expand(-1, len(columns)) if rows.shape[1] == 1 else rows[:, columns // width]


def scale_layout(tensors: Headers, name: str, shape: tuple[int, int], block: Block | None) -> ScaleLayout:
    """Of the scales called `name`. block: what a config says of blocks; ValueError where they do not fit the matrix."""
    if name not in tensors:
        raise ValueError(f"it has no {name}; download the checkpoint again")
    found, (num_rows, depth) = tensors[name].shape, shape
    if found in ((), (1,), (1, 1)):
        return ScaleLayout(shape, shape)
    if found in ((num_rows,), (num_rows, 1)):
        return ScaleLayout(shape, (1, depth))
    if len(found) == 2 and found[0] == num_rows and found[1] and depth % found[1] == 0:
        return ScaleLayout(shape, (1, depth // found[1]))
    if len(found) == 2 and block is not None and found == (num_groups(num_rows, block[0]), num_groups(depth, block[1])):
        return ScaleLayout(shape, block)
    says = "" if block is None else f" in blocks of {block[0]} x {block[1]}"
    raise ValueError(f"its {name} has shape {list(found)}, which no matrix of {num_rows} x {depth} has{says}")


def eight_bit_matrix(
    tensors: Headers, method: str, *, scale: str = "weight_scale", block: Block | None = None
) -> MatrixHeader | None:
    """None of a matrix of other than 8 bits. scale: the name of its scales"""
    weight = tensors.get("weight")
    if weight is None or weight.dtype not in (FLOAT8, FLOAT8_WIDE, "I8"):
        return None
    num_rows, depth = expect_dimensions(tensors, "weight", 2)
    layout = scale_layout(tensors, scale, (num_rows, depth), block)
    is_power = tensors[scale].dtype in EXPONENTS
    if not is_power:
        expect_dtype(tensors, scale, *FLOAT_TYPES)
    used = {name: tensors[name] for name in ("weight", scale)}
    if "weight_zero_point" in tensors:
        expect_shape(tensors, "weight_zero_point", tensors[scale].shape)
        expect_dtype(tensors, "weight_zero_point", "I8", "I32", "I64", FLOAT8, *FLOAT_TYPES)
        used["weight_zero_point"] = tensors["weight_zero_point"]
    is_float = weight.dtype != "I8"
    label = f"{method}, {'8-bit floats' if is_float else '8 bits'}, {layout.label}"
    if is_float:
        kind, why = _kept_floats(weight.dtype, layout)
        read = partial(_read_floats, kind, layout, label, scale)
        return MatrixHeader((num_rows, depth), label, kind, why, used, read)
    kind, why = kept_integers(8, depth, layout.block[1], has_zeros="weight_zero_point" in used)
    return MatrixHeader((num_rows, depth), label, kind, why, used, partial(_read_integers, layout, label, scale))


def _kept_floats(dtype: str, layout: ScaleLayout) -> tuple[int | None, str]:
    """(the format that compiled layers keep them in, or why they do not)"""
    depth, width = layout.shape[1], layout.block[1]
    if dtype != FLOAT8:
        return None, WHY_WIDE
    return (FLOAT8_KIND, "") if fits_chunks(depth, width) else (None, why_not_chunks(depth, width))


def read_scales(tensor: Tensor, name: str) -> Tensor:
    """float32, at least [1, 1]; powers of two from their exponents."""
    scales = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    if scales.dtype == torch.uint8:
        scales = powers_of_two(scales)
    scales = expect_finite(scales.float(), name)
    return scales.reshape(-1, 1) if scales.dim() < 2 else scales


def powers_of_two(exponents: Tensor) -> Tensor:
    """float32 of E8M0: 2^(e - 127), and nothing finite for 255, as the same exponent means it in float32."""
    bits = exponents.int()
    smallest = 1 << 22  # 2^-127 is below the normal numbers
    return torch.where(bits == 0, smallest, bits << 23).view(torch.float32)


def _read_floats(kind: int | None, layout: ScaleLayout, label: str, scale: str, tensors: Tensors) -> StoredLevels:
    weight, scales = tensors["weight"], read_scales(tensors[scale], scale)
    if "weight_zero_point" in tensors and bool(tensors["weight_zero_point"].float().any()):
        raise ValueError("its weight_zero_point is not 0, and 8-bit floats have none")

    def read(start: int, stop: int) -> Tensor:
        return weight[start:stop].float().mul_(layout.rows_of(scales, start, stop))

    if weight.dtype == torch.float8_e4m3fn:
        of_chunks = partial(layout.rows_of, scales, step=GROUP)
        return ScaledFloats(layout.shape, kind, read, weight, scales, of_chunks, label=label)
    return StoredFloats(layout.shape, None, read, label=label)


def _read_integers(layout: ScaleLayout, label: str, scale: str, tensors: Tensors) -> StoredLevels:
    weight, scales = tensors["weight"], read_scales(tensors[scale], scale)
    (num_rows, depth), (height, width) = layout.shape, layout.block
    of_rows = torch.arange(num_rows, device="cpu") // height
    zeros: Tensor | int = 0
    if "weight_zero_point" in tensors:
        zeros = tensors["weight_zero_point"].to(torch.int16).reshape(scales.shape)[of_rows]
    stored = StoredIntegers(
        layout.shape, None, 8, scales[of_rows], zeros, even_groups(depth, width), lambda i, j: weight[i:j],
        is_signed=True, label=label,
    )  # fmt: skip
    return stored.in_smallest_format
