"""Packing of weight matrices: the layout that the register tiles read, and formats that are exact.

A panel is 16 output features, with its input features in order, so that a tile reads memory sequentially.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.numba.core.formats import (
    BFLOAT16,
    DTYPES,
    FLOAT8,
    GROUP,
    INTEGERS,
    NAMES,
    QUADS,
    SUPER_GROUP,
    IntegerFormat,
    Levels,
)
from kernels.numba.core.lanes import LANES
from kernels.numba.packing.levels import pack_planes, unpack_planes

_FLOAT8_SHIFT = 256.0  # what a tile takes numbers of FLOAT8 to be less than they are, and its scales to be more
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """[num_rows, depth] in one of the formats of `kernels.numba.core.formats`."""

    kind: int
    num_rows: int  # output features
    depth: int  # input features, a multiple of 32 or 256 for formats of integers
    values: Tensor  # [panels, ...], as tiles read them
    scales: Tensor  # [panels, ...], as `kernels.numba.core.levels.load_scales` has them, or empty
    order: Tensor | None = None  # int64 [depth]: the element of a row that each depth meets; None: its own

    @property
    def format_name(self) -> str:
        return NAMES[self.kind]

    @property
    def num_panels(self) -> int:
        return self.values.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + (0 if self.order is None else self.order.nbytes)


@dataclass(frozen=True, slots=True)
class Stack:
    """A matrix in one part or several, from top to bottom, in formats that may differ. All but the last fill panels."""

    parts: tuple[PackedMatrix, ...]

    @property
    def format_name(self) -> str:
        return " + ".join(dict.fromkeys(part.format_name for part in self.parts))

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def num_panels(self) -> int:
        return sum(part.num_panels for part in self.parts)

    @property
    def depth(self) -> int:
        return self.parts[0].depth

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def dense(self, start: int, stop: int) -> Tensor:
        """Some rows of the matrix that products multiply by, float32."""
        found, first = [], 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.num_rows)
            if low < high:
                found.append(_dense_rows(part, low, high))
            first += part.num_rows
        return torch.cat(found) if found else torch.empty(0, self.depth)


def _dense_rows(packed: PackedMatrix, start: int, stop: int) -> Tensor:
    first, last = start // LANES, -(-stop // LANES)
    scales = packed.scales[first:last] if packed.scales.numel() else packed.scales
    some = replace(packed, num_rows=stop - first * LANES, values=packed.values[first:last], scales=scales)
    return unpack(some)[start - first * LANES :]


def pack(weight: Tensor, kind: int) -> PackedMatrix:
    """Packs [num_rows, depth] floats, rounding to what the format can hold: floats, int8 or int4, either in quads too.

    float16: within 2^-11 of each element, or 2^-25 where that is more. int8: within 1/254 of the largest element of
    its group of 32, and half the step of a float16 scale. int4: within 1/30 of the span of its group and
    2^-11 of its smallest element, the offset, likewise.
    The integer formats need a depth that is a multiple of 32, bfloat16 an even one.
    """
    if kind in DTYPES:
        return _pack_floats(weight, kind)
    padded = weight.float().reshape(weight.shape[0], -1, GROUP)
    if INTEGERS[kind].bits == 8:
        scales = _round_up(padded.abs().amax(-1) / 127)
        steps = torch.where(scales > 0, scales.float(), 1.0)
        levels = (padded / steps.unsqueeze(-1)).round_().to(torch.int8)
        return pack_levels(Levels(kind & ~QUADS, levels.flatten(1), scales.unsqueeze(-1)), kind)
    low, high = padded.aminmax(dim=-1)
    offsets = low.half()
    scales = _round_up((high - offsets.float()) / 15)
    steps = torch.where(scales > 0, scales.float(), 1.0)
    levels = ((padded - offsets.float().unsqueeze(-1)) / steps.unsqueeze(-1)).round_().clamp_(0, 15)
    both = torch.stack((scales, offsets), -1)
    return pack_levels(Levels(kind & ~QUADS, levels.to(torch.uint8).flatten(1), both), kind)


def pack_exactly(weight: Tensor, kind: int) -> PackedMatrix | None:
    """In a format of 16 bits; None where that does not hold every element as it is."""
    if kind == BFLOAT16 and weight.shape[1] % 2:
        return None
    weight = weight.float().contiguous()
    return _pack_floats(weight, kind) if _is_exact(weight, DTYPES[kind]) else None


def pack_levels(rows: Levels, kind: int) -> PackedMatrix:
    """Rows of integers, or of FLOAT8, and scales as they are, in their format's layout.

    kind: the rows', or the same in quads
    """
    if kind == FLOAT8:
        return _pack_float8(rows)
    assert kind in (rows.kind, rows.kind + QUADS), (kind, rows.kind)
    weights, (num_rows, depth) = INTEGERS[kind], rows.levels.shape
    assert depth % weights.depth_multiple == 0, f"a depth of {depth} in {weights.name}"
    levels = _panels(rows.levels)
    if weights.bits == 8:
        values = levels.unflatten(2, (-1, weights.depths)).transpose(1, 2).contiguous()
    else:
        values = pack_planes(levels, weights)
    factors = _panels(rows.factors).permute(0, 2, 3, 1).contiguous()  # [panels, groups, factors, 16]
    if rows.commons is not None:
        records = factors.view(len(factors), depth // SUPER_GROUP, -1)  # int8
        commons = _panels(rows.commons).permute(0, 2, 3, 1).contiguous().view(torch.int8).flatten(2)
        factors = torch.cat((commons, records), 2)
    return PackedMatrix(kind, num_rows, depth, values, factors)


def unpack(packed: PackedMatrix) -> Tensor:
    """The float32 matrix that the products multiply by: [num_rows, depth], its columns where rows have them."""
    if packed.order is not None:
        return unpack(replace(packed, order=None))[:, torch.argsort(packed.order)]
    if packed.kind in DTYPES:
        values = packed.values.transpose(2, 3).flatten(1, 2) if packed.kind == BFLOAT16 else packed.values
        return values.float().transpose(1, 2).reshape(-1, packed.depth)[: packed.num_rows].contiguous()
    if packed.kind == FLOAT8:
        return _unpack_float8(packed)
    weights, groups = INTEGERS[packed.kind], packed.depth // GROUP
    is_bytes = weights.bits == 8
    levels = packed.values.transpose(1, 2).flatten(2) if is_bytes else unpack_planes(packed.values, weights)
    if weights.table:
        table = torch.tensor(weights.table, dtype=torch.int16)
        levels = table[levels.int()]
    wide = (levels.float() - weights.zero).view(-1, LANES, groups * weights.num_scales, weights.per_scale)
    scales, offsets = _factors(packed, weights)
    wide *= scales.unsqueeze(-1)
    if offsets is not None:
        wide += offsets.unsqueeze(-1)
    return wide.reshape(-1, packed.depth)[: packed.num_rows].contiguous()


def _pack_float8(rows: Levels) -> PackedMatrix:
    num_rows, depth = rows.levels.shape
    assert depth % GROUP == 0, f"a depth of {depth} in FP8"
    values = _panels(rows.levels).transpose(1, 2).contiguous()  # [panels, depth, 16]
    scales = _panels(rows.factors.float().flatten(1) * _FLOAT8_SHIFT).transpose(1, 2).contiguous()
    return PackedMatrix(FLOAT8, num_rows, depth, values, scales)


def _unpack_float8(packed: PackedMatrix) -> Tensor:
    numbers = packed.values.transpose(1, 2).contiguous().view(torch.float8_e4m3fn).float() / _FLOAT8_SHIFT
    scales = packed.scales.transpose(1, 2).unsqueeze(-1)  # [panels, 16, groups, 1]
    wide = numbers.unflatten(2, (-1, GROUP)) * scales
    return wide.reshape(-1, packed.depth)[: packed.num_rows].contiguous()


def unpack_rows(packed: PackedMatrix, rows: Tensor) -> Tensor:
    """Some rows of `unpack`, by their numbers."""
    panels = rows // LANES
    scales = packed.scales[panels] if packed.scales.numel() else packed.scales
    some = replace(packed, num_rows=len(rows) * LANES, values=packed.values[panels], scales=scales)
    return unpack(some).view(len(rows), LANES, -1)[torch.arange(len(rows)), rows % LANES]


def _factors(packed: PackedMatrix, weights: IntegerFormat) -> tuple[Tensor, Tensor | None]:
    """The scales, and the offsets if it has any, float32 [panels, 16, groups * scales of each]."""
    num_panels, groups = packed.num_panels, packed.depth // GROUP
    if weights.is_two_level:
        skipped = 2 * LANES * (1 + weights.has_offsets)
        commons = packed.scales[:, :, :skipped].contiguous().view(torch.float16).float()
        commons = commons.view(num_panels, -1, 1, 1 + weights.has_offsets, 1, LANES)
        small = packed.scales[:, :, skipped:].float()
        small = small.reshape(num_panels, -1, SUPER_GROUP // GROUP, 1 + weights.has_offsets, weights.num_scales, LANES)
        found = (small * commons).flatten(1, 2)
    else:
        found = packed.scales.float().view(num_panels, groups, 1 + weights.has_offsets, weights.num_scales, LANES)
    of_columns = found.permute(2, 0, 4, 1, 3).flatten(3)  # [1 or 2, panels, 16, groups * scales]
    if not weights.has_offsets:
        return of_columns[0].contiguous(), None
    scales, offsets = of_columns[0].contiguous(), of_columns[1].contiguous()
    return scales, -offsets * scales if weights.has_zeros else offsets


def _is_exact(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the format holds every element. Checks a few rows first, since most matrices are exact or far from it."""
    return all(torch.equal(rows.to(dtype).float(), rows) for rows in (weight[:16], weight[16:]))


def fits_float16(weight: Tensor) -> bool:
    """Whether no element would become infinite."""
    low, high = weight.aminmax()
    return bool(low >= -_HALF_MAX) and bool(high <= _HALF_MAX)


def _panels(values: Tensor) -> Tensor:
    """[num_rows, ...] -> [panels, 16, ...], rows of zeros at the end"""
    missing = -values.shape[0] % LANES
    if missing:
        values = torch.cat((values, values.new_zeros(missing, *values.shape[1:])))
    return values.view(-1, LANES, *values.shape[1:])


def _pack_floats(weight: Tensor, kind: int) -> PackedMatrix:
    values = _panels(weight.to(DTYPES[kind])).transpose(1, 2).contiguous()
    if kind == BFLOAT16:  # in pairs of depths: [panels, depth / 2, 16, 2]
        assert weight.shape[1] % 2 == 0, f"a depth of {weight.shape[1]}"
        values = values.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()
    return PackedMatrix(kind, weight.shape[0], weight.shape[1], values, torch.empty(0, dtype=torch.float16))


def _round_up(scales: Tensor) -> Tensor:
    """To float16, never down: a smaller step would push the largest level out of its range."""
    rounded = scales.half()
    return torch.where(rounded.float() < scales, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)
