"""Matrices of 4-bit floats (E2M1): 0, 0.5, 1, 1.5, 2, 3, 4, 6, and a sign; two to a byte, the lower one first.

mxfp4 has a power of two for each 32 (OCP Microscaling Formats, 2023); nvfp4 an E4M3 number for each 16, and one float32
for all, which compressed-tensors divides by and ModelOpt multiplies by.
"""

from __future__ import annotations

from functools import partial

import torch

from engine.loading.quantized.eight_bits import EXPONENTS, powers_of_two
from engine.loading.quantized.matrix_header import (
    Headers,
    MatrixHeader,
    Tensors,
    expect_dimensions,
    expect_dtype,
    expect_finite,
    expect_shape,
    fits_chunks,
    why_not_chunks,
)
from engine.quantization.stored_integers import FourBitFloats
from engine.quantization.stored_levels import StoredLevels
from kernels.numba.core.formats import MXFP4, NVFP4

_MXFP4_GROUP, _NVFP4_GROUP = 32, 16


def mxfp4_matrix(tensors: Headers, method: str, *, packed: str = "weight_packed") -> MatrixHeader:
    """packed: the name of the bytes"""
    shape = _shape(tensors, packed, _MXFP4_GROUP)
    expect_dtype(tensors, "weight_scale", *EXPONENTS)
    label = f"{method}, mxfp4, groups of {_MXFP4_GROUP}"
    used = {name: tensors[name] for name in (packed, "weight_scale")}
    return MatrixHeader(shape, label, MXFP4, "", used, partial(_read_mxfp4, label, packed))


def nvfp4_matrix(
    tensors: Headers, method: str, *, packed: str = "weight_packed", divisor: str = "", factor: str = ""
) -> MatrixHeader:
    """divisor, factor: the name of the number for all, one of them"""
    shape = _shape(tensors, packed, _NVFP4_GROUP)
    expect_dtype(tensors, "weight_scale", "F8_E4M3")
    whole = divisor or factor
    if whole not in tensors or tensors[whole].shape not in ((), (1,)):
        raise ValueError(f"it has no {whole} of one number; download the checkpoint again")
    expect_dtype(tensors, whole, "F32", "BF16", "F16")
    label = f"{method}, nvfp4, groups of {_NVFP4_GROUP}"
    used = {name: tensors[name] for name in (packed, "weight_scale", whole)}
    is_kept = fits_chunks(shape[1], shape[1])
    why = "" if is_kept else why_not_chunks(shape[1], shape[1])
    read = partial(_read_nvfp4, label, packed, divisor, factor)
    return MatrixHeader(shape, label, NVFP4 if is_kept else None, why, used, read)


def _shape(tensors: Headers, packed: str, group_size: int) -> tuple[int, int]:
    expect_dtype(tensors, packed, "U8")
    num_rows, num_bytes = expect_dimensions(tensors, packed, 2)
    depth = 2 * num_bytes
    if depth % group_size:
        raise ValueError(f"its {depth} inputs do not divide into groups of {group_size}")
    expect_shape(tensors, "weight_scale", (num_rows, depth // group_size))
    return num_rows, depth


def _read_mxfp4(label: str, packed: str, tensors: Tensors) -> StoredLevels:
    scales = powers_of_two(tensors["weight_scale"].view(torch.uint8))
    return FourBitFloats.of(label, tensors[packed], expect_finite(scales, "weight_scale") / 2)


def _read_nvfp4(label: str, packed: str, divisor: str, factor: str, tensors: Tensors) -> StoredLevels:
    whole = expect_finite(tensors[divisor or factor].float(), divisor or factor).reshape(())
    scales = tensors["weight_scale"].float()
    if divisor and not bool(whole):
        raise ValueError(f"its {divisor} is 0; the file is damaged")
    scales = scales / whole if divisor else scales * whole
    return FourBitFloats.of(label, tensors[packed], expect_finite(scales, "weight_scale") / 2)
