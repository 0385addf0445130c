"""GPTQ's layout (Frantar et al., 2022; as AutoGPTQ and GPTQModel write it): words that hold inputs of one output.

qweight: int32 [inputs * bits / 32, outputs]; qzeros: int32 [groups, outputs * bits / 32]; scales: [groups, outputs];
g_idx: int32 [inputs], the group of each; without it, neighbours are groups. weight = (q - zero) * scale. The first
version of the layout has zero - 1, taken from whole words, so that it borrows from the neighbour where it is 0.
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
    transposed_rows,
)
from engine.loading.quantized.scheme import Scheme
from engine.quantization.bit_packing import num_words, unpack_bits
from engine.quantization.stored_integers import StoredIntegers, even_groups

_BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in each field of a word
_FIRST, _SECOND = ("", "gptq"), ("gptq_v2",)  # values of checkpoint_format


def gptq_matrix(tensors: Headers, scheme: Scheme) -> MatrixHeader | None:
    """None of a layer that has no qweight. ValueError for tensors that do not go together."""
    if "qweight" not in tensors:
        return None
    version = scheme.text("checkpoint_format")
    if version not in (*_FIRST, *_SECOND):
        raise ValueError(f"its layout is {version!r}, but only gptq and gptq_v2 are supported; convert it to gptq_v2")
    num_word_rows, num_rows = expect_dimensions(tensors, "qweight", 2)
    groups = expect_dimensions(tensors, "scales", 2)[0]
    expect_shape(tensors, "scales", (groups, num_rows))
    expect_dtype(tensors, "qweight", "I32")
    expect_dtype(tensors, "scales", *FLOAT_TYPES)
    expect_dimensions(tensors, "qzeros", 2)
    expect_dtype(tensors, "qzeros", "I32")
    bits = _find_bits(tensors, scheme)
    depth = num_word_rows * 32 // bits
    expect_shape(tensors, "qzeros", (groups, num_words(num_rows, bits)))
    if "g_idx" in tensors:
        expect_shape(tensors, "g_idx", (depth,))
        expect_dtype(tensors, "g_idx", "I32", "I64")
    group_size = _group_size(depth, groups, scheme, has_index="g_idx" in tensors)
    kind, why = kept_integers(bits, depth, group_size, has_zeros=not scheme.flag("sym", True))
    label = f"GPTQ, {bits} bits, {group_label(depth, group_size)}"
    if scheme.flag("desc_act", False):
        label += ", in activation order"
    used = {name: tensors[name] for name in ("qweight", "qzeros", "scales", "g_idx") if name in tensors}
    read = partial(_read, bits, group_size, label, version in _FIRST)
    return MatrixHeader((num_rows, depth), label, kind, why, used, read)


def _find_bits(tensors: Headers, scheme: Scheme) -> int:
    """As the shapes have it: layers may differ (`dynamic`), and old files say nothing."""
    num_word_rows, num_rows = tensors["qweight"].shape
    index = tensors.get("g_idx")

    def fits(bits: int) -> bool:
        depth, rest = divmod(num_word_rows * 32, bits)
        is_whole = rest == 0 and tensors["qzeros"].shape[1] == num_words(num_rows, bits)
        return is_whole and (index is None or index.shape == (depth,))

    asked = scheme.bits("bits", "w_bit")
    if asked is not None and asked not in _BITS:
        raise ValueError(f"{scheme.place} says {asked} bits, but GPTQ's are {', '.join(map(str, _BITS))}")
    fitting = [bits for bits in _BITS if fits(bits)]
    if len(fitting) != 1:
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in tensors if name != "bias")
        says = "" if asked is None else f", with {asked} bits"
        raise ValueError(f"its tensors do not fit together{says}: {shapes}")
    if asked not in (None, fitting[0]) and not scheme.has_overrides:
        raise ValueError(f"{scheme.place} says {asked} bits, but its tensors have {fitting[0]}")
    return fitting[0]


def _group_size(depth: int, groups: int, scheme: Scheme, *, has_index: bool) -> int:
    """Inputs of a group, on the average where an index says which they are."""
    asked = scheme.integer("group_size", "q_group_size")
    size = depth if asked is not None and asked <= 0 else asked
    if size is not None and num_groups(depth, size) == groups:
        return size
    if depth % groups == 0 and (size is None or has_index or scheme.has_overrides):
        return depth // groups
    says = "" if size is None else f" of {size}"
    raise ValueError(f"its {depth} inputs do not divide into {groups} groups{says}")


def _read(bits: int, group_size: int, label: str, is_first: bool, tensors: Tensors) -> StoredIntegers:
    words = tensors["qweight"]
    num_rows, depth = words.shape[1], words.shape[0] * 32 // bits
    groups = tensors["scales"].shape[0]
    scales = expect_finite(tensors["scales"], "scales").T.contiguous()
    zeros = zero_points(tensors["qzeros"], bits, num_rows, is_first=is_first).T.contiguous()
    group, order = in_order_of_groups(tensors.get("g_idx"), depth, groups, group_size)

    def read_levels(start: int, stop: int) -> Tensor:
        levels = unpack_bits(transposed_rows(words, start, stop), bits, depth)
        return levels if order is None else levels[:, order]

    stored = StoredIntegers((num_rows, depth), None, bits, scales, zeros, group, read_levels, label=label, order=order)
    return stored.in_smallest_format


def zero_points(words: Tensor, bits: int, num_rows: int, *, is_first: bool) -> Tensor:
    """[groups, num_rows] uint8 of qzeros. is_first: of the first version of the layout"""
    if is_first and bits in _ONES:
        words = (words.long() + _ONES[bits]).to(torch.int32)
    zeros = unpack_bits(words, bits, num_rows)
    return (zeros + 1) & ((1 << bits) - 1) if is_first and bits not in _ONES else zeros


def in_order_of_groups(index: Tensor | None, depth: int, groups: int, group_size: int) -> tuple[Tensor, Tensor | None]:
    """(the group of each column, the order in which those of one group lie side by side; None if they do already).

    An index of zeros, where there are several groups, is one that was never filled in.
    """
    if index is None or (groups > 1 and not bool(index.any())):
        return even_groups(depth, group_size), None
    group = index.long()
    low, high = group.aminmax()
    if int(low) < 0 or int(high) >= groups:
        raise ValueError(
            f"its g_idx names groups {int(low)} to {int(high)}, but there are {groups}; the file is damaged"
        )
    if bool((group[1:] >= group[:-1]).all()):
        return group, None
    order = torch.argsort(group, stable=True)
    return group[order], order
