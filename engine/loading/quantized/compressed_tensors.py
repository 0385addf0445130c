"""The formats of the compressed-tensors library, told apart by the tensors that each matrix has.

A config has groups of layers with a format each, and patterns that say which layers; the tensors say it as well, and
patterns of strangers may take for ever to match. So only the bits of packed integers come from the config, where the
widths of the words leave a choice: since May 2026 3, 5, 6 and 7 bits are packed without gaps, before that with some.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from engine.loading.json_file import JsonObject
from engine.loading.quantized.eight_bits import Block, eight_bit_matrix
from engine.loading.quantized.four_bit_floats import mxfp4_matrix, nvfp4_matrix
from engine.loading.quantized.gptq import in_order_of_groups
from engine.loading.quantized.matrix_header import (
    FLOAT_TYPES,
    Headers,
    MatrixHeader,
    Tensors,
    expect_dimensions,
    expect_dtype,
    expect_finite,
    expect_shape,
    group_label,
    kept_integers,
)
from engine.loading.quantized.scheme import Scheme
from engine.quantization.bit_packing import num_padded_words, num_words, unpack_bits, unpack_padded_bits
from engine.quantization.stored_integers import StoredIntegers
from engine.quantization.stored_levels import StoredLevels

_METHOD = "compressed-tensors"
_BITS = range(2, 9)
_MOST_ELEMENTS = 1 << 40  # of a matrix


def compressed_matrix(tensors: Headers, scheme: Scheme) -> MatrixHeader | None:
    """None of a layer of floats. ValueError for tensors that do not go together, and for layouts that are not known."""
    if scheme.fields.get("transform_config"):
        raise ValueError("its config asks for rotations of activations (transform_config), which are not supported")
    packed = tensors.get("weight_packed")
    if packed is None:
        if "bitmask" in tensors or "weight_bitmask" in tensors:
            raise ValueError("it is stored sparse, which is not supported; save it dense")
        return eight_bit_matrix(tensors, _METHOD, block=_block(scheme))
    if packed.dtype != "U8":
        return _packed_integers(tensors, scheme)
    scale = tensors.get("weight_scale")
    if scale is not None and scale.dtype == "F8_E4M3":
        return nvfp4_matrix(tensors, _METHOD, divisor="weight_global_scale")
    return mxfp4_matrix(tensors, _METHOD)


def _weight_args(scheme: Scheme) -> Iterator[JsonObject]:
    """What each group of layers says of its weights."""
    groups = scheme.fields.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def _block(scheme: Scheme) -> Block | None:
    for weights in _weight_args(scheme):
        found = weights.get("block_structure")
        if isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
            return found[0], found[1]
    return None


def _packed_integers(tensors: Headers, scheme: Scheme) -> MatrixHeader:
    expect_dtype(tensors, "weight_packed", "I32")
    num_rows, width = expect_dimensions(tensors, "weight_packed", 2)
    groups = expect_dimensions(tensors, "weight_scale", 2)[1]
    expect_shape(tensors, "weight_scale", (num_rows, groups))
    expect_dtype(tensors, "weight_scale", *FLOAT_TYPES)
    expect_shape(tensors, "weight_shape", (2,))
    expect_dtype(tensors, "weight_shape", "I64", "I32")
    depth = _read_depth(tensors, num_rows)
    if not 1 <= groups <= depth or depth % groups:
        raise ValueError(f"its {depth} inputs do not divide into {groups} groups")
    bits, is_padded = _find_bits(depth, width, scheme)
    has_zeros = "weight_zero_point" in tensors
    if has_zeros:
        words = (num_padded_words if is_padded else num_words)(num_rows, bits)
        expect_shape(tensors, "weight_zero_point", (words, groups))
        expect_dtype(tensors, "weight_zero_point", "I32")
    if "weight_g_idx" in tensors:
        expect_shape(tensors, "weight_g_idx", (depth,))
        expect_dtype(tensors, "weight_g_idx", "I32", "I64")
    size = depth // groups
    kind, why = kept_integers(bits, depth, size, has_zeros=has_zeros)
    label = f"{_METHOD}, {bits} bits, {group_label(depth, size)}"
    wanted = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    used = {name: tensors[name] for name in wanted if name in tensors}
    read = partial(_read, (num_rows, depth), label, bits, is_padded)
    return MatrixHeader((num_rows, depth), label, kind, why, used, read)


def _read_depth(tensors: Headers, num_rows: int) -> int:
    """The only number that no shape has."""
    shape = tensors["weight_shape"].rows(0, 2).tolist()
    if shape[0] != num_rows or not 1 <= shape[1] < _MOST_ELEMENTS // num_rows:
        raise ValueError(f"its weight_shape is {shape}, but weight_packed has {num_rows} rows; the file is damaged")
    return int(shape[1])


def _find_bits(depth: int, width: int, scheme: Scheme) -> tuple[int, bool]:
    """(bits, whether words have gaps). Without gaps is the later layout; where both are as wide, they are the same."""
    asked = {bits for weights in _weight_args(scheme) if type(bits := weights.get("num_bits")) is int}
    for bits in sorted(asked & set(_BITS)) or _BITS:
        if num_words(depth, bits) == width:
            return bits, False
        if num_padded_words(depth, bits) == width:
            return bits, True
    says = f"{', '.join(map(str, sorted(asked)))} bits" if asked else "2 to 8 bits"
    raise ValueError(f"its weight_packed has {width} words for {depth} inputs, which {says} do not take")


def _read(shape: tuple[int, int], label: str, bits: int, is_padded: bool, tensors: Tensors) -> StoredLevels:
    (num_rows, depth), words = shape, tensors["weight_packed"]
    unpack = unpack_padded_bits if is_padded else unpack_bits
    scales = expect_finite(tensors["weight_scale"], "weight_scale")
    groups, zeros = scales.shape[1], tensors.get("weight_zero_point")
    middle = 1 << (bits - 1)
    found: Tensor | int = middle if zeros is None else unpack(zeros.T.contiguous(), bits, num_rows).T.contiguous()
    group, order = in_order_of_groups(tensors.get("weight_g_idx"), depth, groups, depth // groups)

    def read_levels(start: int, stop: int) -> Tensor:
        levels = unpack(words[start:stop], bits, depth)
        return levels if order is None else levels[:, order]

    stored = StoredIntegers(shape, None, bits, scales, found, group, read_levels, label=label, order=order)
    return stored.in_smallest_format
