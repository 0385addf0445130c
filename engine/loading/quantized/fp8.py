"""Checkpoints of 8-bit floats by transformers' `fp8` and `fbgemm_fp8`, and NVIDIA's ModelOpt with its 4-bit floats."""

from __future__ import annotations

from engine.loading.quantized.eight_bits import Block, eight_bit_matrix
from engine.loading.quantized.four_bit_floats import nvfp4_matrix
from engine.loading.quantized.matrix_header import Headers, MatrixHeader
from engine.loading.quantized.scheme import Scheme

_BLOCK = (128, 128)  # where a config does not say


def fp8_matrix(tensors: Headers, scheme: Scheme) -> MatrixHeader | None:
    """None of a layer of floats. `weight_scale_inv` multiplies too, despite its name; it is of blocks."""
    if "weight_scale_inv" in tensors:
        return eight_bit_matrix(tensors, "FP8", scale="weight_scale_inv", block=_block(scheme))
    return eight_bit_matrix(tensors, "FP8", block=_block(scheme))


def modelopt_matrix(tensors: Headers, scheme: Scheme) -> MatrixHeader | None:
    """By what each layer has, as algorithms may be mixed. None of a layer of floats."""
    weight = tensors.get("weight")
    if weight is not None and weight.dtype == "U8":
        return nvfp4_matrix(tensors, "ModelOpt", packed="weight", factor="weight_scale_2")
    return eight_bit_matrix(tensors, "ModelOpt", block=_block(scheme))


def _block(scheme: Scheme) -> Block:
    found = scheme.fields.get("weight_block_size")
    if isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
        return found[0], found[1]
    return _BLOCK
