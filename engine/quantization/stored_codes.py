"""Matrices that a checkpoint has quantised, as a GPU's kernels multiply with them: nothing is rounded once more."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.quantization.bit_packing import unpack_bits
from engine.quantization.linear import LinearSpec
from engine.quantization.stored_integers import FourBitFloats, StoredIntegers
from engine.quantization.stored_levels import StoredLevels
from kernels.triton.quantized.matrix import GROUP_SIZES, QuantizedMatrix, Values, make_matrix


class CodeFormat(NamedTuple):
    """What all parts of a matrix have in common."""

    bits: int
    group_size: int
    values: Values
    scales: torch.dtype
    factor: float = 1.0  # of all of them


class StoredCodes(NamedTuple):
    """A part of a matrix: the arguments of `make_matrix`, which says what they mean.

    codes: [num_outputs, num_inputs]; scales, zeros, offsets: [num_outputs, num_groups]; order: [num_inputs], the input
    that each column of codes is for (act-order: sort the columns by group, and give their numbers)
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    order: Tensor | None = None


def matrix_of_codes(
    spec: LinearSpec,
    parts: list[StoredCodes],
    *,
    bits: int,
    group_size: int,
    values: Values | Tensor = "integer",
    channel_scales: Tensor | None = None,
) -> QuantizedMatrix:
    """A layer's matrix of the codes of all its parts, from top to bottom, on the default device.

    bits, group_size, values, channel_scales: as of `make_matrix`. ValueError for parts that do not fit together, or
    that no kernel multiplies with.
    """
    device = torch.get_default_device()
    check_parts(spec, [part.codes for part in parts])
    return make_matrix(
        torch.cat([part.codes.to(device) for part in parts]),
        torch.cat([part.scales.to(device) for part in parts]),
        _stacked([part.zeros for part in parts], "zeros", device),
        bits=bits,
        group_size=group_size,
        order=_common_order([part.order for part in parts], device),
        values=values,
        offsets=_stacked([part.offsets for part in parts], "offsets", device),
        channel_scales=channel_scales,
    )


def kept_as_stored(spec: LinearSpec, parts: list[Tensor | StoredLevels], *, max_bits: int) -> QuantizedMatrix | None:
    """A layer's matrix of what a checkpoint has, on the default device.

    None where some part is floats or has more bits, parts differ in format or in the order of their inputs, or no
    kernel multiplies with them. ValueError for scales that are no numbers.
    """
    formats = {_format_of(part) for part in parts}
    if len(formats) != 1:
        return None
    (found,) = formats
    if found is None or found.bits > max_bits or not _has_one_order(parts):
        return None
    with torch.device("cpu"):  # where files are
        codes = [_codes_of(part, found) for part in parts if isinstance(part, (StoredIntegers, FourBitFloats))]
    if any(part.zeros is not None for part in codes):
        codes = [part if part.zeros is not None else _with_zeros(part, found.bits) for part in codes]
    factor = None if found.factor == 1.0 else torch.tensor([found.factor], device="cpu")
    return matrix_of_codes(
        spec, codes, bits=found.bits, group_size=found.group_size, values=found.values, channel_scales=factor
    )


def _format_of(part: Tensor | StoredLevels) -> CodeFormat | None:
    if not isinstance(part, (StoredIntegers, FourBitFloats)):
        return None
    depth, num_groups = part.shape[1], part.scales.shape[1]
    group_size = depth // num_groups
    if depth % num_groups or group_size not in (*GROUP_SIZES, depth):
        return None
    if isinstance(part, FourBitFloats):
        doubled = part.scales.float() * 2
        is_power = bool((doubled.to(torch.float8_e8m0fnu).float() == doubled).all())
        return CodeFormat(4, group_size, "e2m1", torch.float8_e8m0fnu if is_power else torch.float32)
    if not torch.equal(part.group, torch.arange(depth, device=part.group.device) // group_size):
        return None
    shift = _shift(part)
    low, high = (part.zeros,) * 2 if isinstance(part.zeros, int) else (int(one) for one in part.zeros.aminmax())
    if low + shift < 0 or high + shift > 2**part.bits:
        return None
    is_narrow = part.scales.dtype in (torch.float16, torch.bfloat16)
    scales = part.scales.dtype if is_narrow else torch.float32
    return CodeFormat(part.bits, group_size, "integer", scales, part.factor)


def _codes_of(part: StoredIntegers | FourBitFloats, found: CodeFormat) -> StoredCodes:
    num_rows, depth = part.shape
    if isinstance(part, FourBitFloats):
        return StoredCodes(unpack_bits(part.octets, 4, depth), (part.scales.float() * 2).to(found.scales))
    shift = _shift(part)
    codes = (part.read_levels(0, num_rows).to(torch.int16) + shift).to(torch.uint8)
    scales = part.scales.to(found.scales)
    if isinstance(part.zeros, int):
        is_middle = part.zeros + shift == 2 ** (part.bits - 1)
        zeros = None if is_middle else torch.full(part.scales.shape, part.zeros + shift, dtype=torch.int16)
    else:
        zeros = part.zeros.to(torch.int16) + shift
    return StoredCodes(codes, scales, zeros, order=part.order)


def _shift(part: StoredIntegers) -> int:
    """What makes the least level 0."""
    return 1 << (part.bits - 1) if part.is_signed else 0


def _with_zeros(part: StoredCodes, bits: int) -> StoredCodes:
    return part._replace(zeros=torch.full(part.scales.shape, 1 << (bits - 1), dtype=torch.int16, device="cpu"))


def _has_one_order(parts: list[Tensor | StoredLevels]) -> bool:
    orders = [part.order for part in parts if isinstance(part, StoredLevels)]
    first = orders[0]
    if first is None:
        return all(order is None for order in orders)
    return all(order is not None and torch.equal(order, first) for order in orders)


def check_parts(spec: LinearSpec, parts: list[Tensor]) -> None:
    """ValueError where the parts of a matrix do not make up the whole."""
    if sum(map(len, parts)) != spec.num_outputs or any(part.shape[1:] != (spec.num_inputs,) for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"codes of {shapes} for a matrix of {spec.shape}")


def _stacked(parts: list[Tensor | None], name: str, device: torch.device) -> Tensor | None:
    there = [part.to(device) for part in parts if part is not None]
    if there and len(there) < len(parts):
        raise ValueError(f"some parts of a matrix have {name}, and others have none")
    return torch.cat(there) if there else None


def _common_order(orders: list[Tensor | None], device: torch.device) -> Tensor | None:
    first = orders[0]
    if any((order is None) != (first is None) for order in orders):
        raise ValueError("some parts of a matrix have their inputs in another order, and others have not")
    if first is None:
        return None
    if not all(order is not None and torch.equal(order, first) for order in orders):
        raise ValueError("the parts of a matrix have their inputs in different orders, but one product reads them once")
    return first.to(device)
