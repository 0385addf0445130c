"""AWQ's layout (Lin et al., 2023; AutoAWQ's "gemm"): words that hold outputs of one input.

qweight: int32 [inputs, outputs * bits / 32]; qzeros: int32 [groups, likewise]; scales: [groups, outputs]. Of 4 bits,
field i of a word is output `_ORDER[i]` of its eight; other bits, which GPTQModel writes, are in order.
weight = (q - zero) * scale.
"""

from __future__ import annotations

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
    group_label,
    kept_integers,
    num_groups,
)
from engine.loading.quantized.scheme import Scheme
from engine.quantization.bit_packing import num_words, unpack_bits
from engine.quantization.stored_integers import StoredIntegers, even_groups

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = torch.tensor([_ORDER.index(i) for i in range(8)], device="cpu")  # the field of each output
_USUAL_BITS = 4
_NEIGHBOURS = 32  # outputs that are whole words, of any bits


def awq_matrix(tensors: Headers, scheme: Scheme) -> MatrixHeader | None:
    """None of a layer that has no qweight. ValueError for tensors that do not go together, and for other layouts."""
    if "qweight" not in tensors:
        return None
    version = scheme.text("version")
    if version not in ("", "gemm", "awqversion.gemm"):
        raise ValueError(f"its layout is AWQ's {version!r}, but only gemm is supported; save it again as gemm")
    if "qzeros" not in tensors:
        raise ValueError("it has no qzeros, and AWQ without zero points is not supported")
    depth, width = expect_dimensions(tensors, "qweight", 2)
    groups, num_rows = expect_dimensions(tensors, "scales", 2)
    bits = _find_bits(num_rows, width, scheme)
    expect_shape(tensors, "qzeros", (groups, width))
    for name in ("qweight", "qzeros"):
        expect_dtype(tensors, name, "I32")
    expect_dtype(tensors, "scales", *FLOAT_TYPES)
    asked = scheme.integer("group_size", "q_group_size")
    size = depth if asked is not None and asked <= 0 else asked or depth // groups
    if size < 1 or num_groups(depth, size) != groups:
        raise ValueError(f"its {depth} inputs do not divide into {groups} groups of {size}")
    kind, why = kept_integers(bits, depth, size, has_zeros=True)
    label = f"AWQ, {bits} bits, {group_label(depth, size)}"
    used = {name: tensors[name] for name in ("qweight", "qzeros", "scales")}
    return MatrixHeader((num_rows, depth), label, kind, why, used, partial(_read, bits, size, label))


def _find_bits(num_rows: int, width: int, scheme: Scheme) -> int:
    """As the config has it, unless layers may differ. width: words of an input"""
    asked = scheme.bits("bits", "w_bit") or _USUAL_BITS
    candidates: tuple[int, ...] = (asked, *range(2, 9)) if scheme.has_overrides else (asked,)
    for bits in candidates:
        if num_words(num_rows, bits) == width and (bits != _USUAL_BITS or num_rows % 8 == 0):
            return bits
    raise ValueError(f"its qweight has {width} words for {num_rows} outputs, which {asked} bits do not take")


def _read(bits: int, group_size: int, label: str, tensors: Tensors) -> StoredIntegers:
    words = tensors["qweight"]
    depth, num_rows = words.shape[0], tensors["scales"].shape[1]
    scales = expect_finite(tensors["scales"], "scales").T.contiguous()

    def read_levels(start: int, stop: int) -> Tensor:
        first = start // _NEIGHBOURS * _NEIGHBOURS  # whose words begin together
        last = min(-(-stop // _NEIGHBOURS) * _NEIGHBOURS, num_rows)
        some = words[:, first * bits // 32 : num_words(last, bits)]
        return _fields(some, bits, last - first)[:, start - first : stop - first].T.contiguous()

    zeros = _fields(tensors["qzeros"], bits, num_rows).T.contiguous()
    group = even_groups(depth, group_size)
    stored = StoredIntegers((num_rows, depth), None, bits, scales, zeros, group, read_levels, label=label)
    return stored.in_smallest_format


def _fields(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [any, words] -> uint8 [any, count], in the order of the outputs."""
    if bits != _USUAL_BITS:
        return unpack_bits(words, bits, count)
    fields = unpack_bits(words, bits, 8 * words.shape[1]).view(len(words), -1, 8)
    outputs: Tensor = fields[:, :, _PLACES].flatten(1)[:, :count]
    return outputs
