"""Packing of weight matrices: the layout that the register tiles read, and the smallest format that is exact.

A panel is 16 output features, with its input features in order, so that a tile reads memory sequentially.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.numba.core.formats import BFLOAT16, DTYPES, FLOAT16, IN_QUADS, INT4, INT8, NAMES, QUAD_INT4, QUAD_INT8
from kernels.numba.core.lanes import GROUP, LANES
from kernels.numba.packing.levels import read_int4, read_int8

SMALLEST_FIRST = (INT4, INT8, BFLOAT16, FLOAT16)
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """[num_rows, depth] in one of the formats of `kernels.numba.core.formats`."""

    kind: int
    num_rows: int  # output features
    depth: int  # input features, a multiple of 32 for the integer formats
    values: Tensor  # [panels, ...], as `kernels.numba.core.tiles` reads them
    scales: Tensor  # [panels, groups, (2,) 16] float16, or empty

    @property
    def format_name(self) -> str:
        return NAMES[self.kind]

    @property
    def num_panels(self) -> int:
        return self.values.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def pack(weight: Tensor, kind: int) -> PackedMatrix:
    """Packs [num_rows, depth] floats, rounding to what the format can hold.

    float16: within 2^-11 of each element, or 2^-25 where that is more. int8: within 1/254 of the largest element of
    its group of 32, and half the step of a float16 scale. int4: within 1/30 of the span of its group and
    2^-11 of its smallest element, the offset, likewise.
    The integer formats need a depth that is a multiple of 32, bfloat16 an even one.
    """
    if kind in DTYPES:
        return _pack_floats(weight, kind)
    padded = weight.float().view(weight.shape[0], -1, GROUP)
    if kind == INT8:
        scales = _round_up(padded.abs().amax(-1) / 127)
        steps = torch.where(scales > 0, scales.float(), 1.0)
        return _pack_int8(weight, (padded / steps.unsqueeze(-1)).round_().to(torch.int8), scales)
    low, high = padded.aminmax(dim=-1)
    offsets = low.half()
    scales = _round_up((high - offsets.float()) / 15)
    steps = torch.where(scales > 0, scales.float(), 1.0)
    levels = ((padded - offsets.float().unsqueeze(-1)) / steps.unsqueeze(-1)).round_().clamp_(0, 15)
    return _pack_int4(weight, levels.to(torch.uint8), scales, offsets)


def pack_exactly(weight: Tensor, *, among: Sequence[int]) -> PackedMatrix | None:
    """The first of these formats, FLOAT32 not among them, that holds every element as it is; None where none does.

    Matrices that were quantised to GGUF's Q4_0, Q4_1 or Q8_0 get their integers and scales back.
    """
    weight = weight.float().contiguous()
    is_bfloat16 = BFLOAT16 in among and not weight.shape[1] % 2 and _is_exact(weight, torch.bfloat16)
    for kind in among:
        if kind == INT4 and not is_bfloat16 and (packed := _find_int4(weight)):
            return packed
        if kind == INT8 and not is_bfloat16 and (packed := _find_int8(weight)):
            return packed
        if kind == BFLOAT16 and is_bfloat16:
            return _pack_floats(weight, BFLOAT16)
        if kind == FLOAT16 and _is_exact(weight, torch.float16):
            return _pack_floats(weight, FLOAT16)
    return None


def in_quads(packed: PackedMatrix) -> PackedMatrix:
    """The same matrix for rows of 8-bit integers, with four depths side by side; as it is where it has no integers."""
    if packed.kind not in IN_QUADS:
        return packed
    pairs = _pairs_of_octets(packed.values) if packed.kind == INT4 else packed.values
    quads = pairs.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)  # [panels, depth / 4, 16, 4]
    if packed.kind == INT4:
        quads = quads[:, ::2] | (quads[:, 1::2] << 4)
    return replace(packed, kind=IN_QUADS[packed.kind], values=quads.contiguous())


def _in_pairs(packed: PackedMatrix) -> PackedMatrix:
    """The inverse of `in_quads`."""
    kind, quads = (INT8, packed.values) if packed.kind == QUAD_INT8 else (INT4, _interleave(packed.values))
    pairs = quads.unflatten(3, (2, 2)).transpose(2, 3).flatten(1, 2)  # [panels, depth / 2, 16, 2]
    return replace(packed, kind=kind, values=(pairs if kind == INT8 else _octets(pairs)).contiguous())


def _interleave(values: Tensor) -> Tensor:
    """uint8 [panels, depth / 8, 16, 4] with two int4 each -> [panels, depth / 4, 16, 4]"""
    return torch.stack((values & 15, values >> 4), 2).flatten(1, 2)


def _octets(pairs: Tensor) -> Tensor:
    """Pairs of levels, uint8 [panels, depth / 2, 16, 2] -> int32 [panels, depth / 8, 16], as int4 tiles read them:
    those of four pairs of depths, the first of each in the lower half."""
    four = pairs.unflatten(1, (-1, 4)).int()  # [panels, depth / 8, 4, 16, 2]
    packed = torch.zeros(four.shape[0], four.shape[1], LANES, dtype=torch.int32)
    for pair in range(4):
        for place in range(2):
            packed |= four[:, :, pair, :, place] << (4 * pair + 16 * place)
    return packed


def _pairs_of_octets(octets: Tensor) -> Tensor:
    """The inverse of `_octets`."""
    levels = [[(octets >> (4 * pair + 16 * place)) & 15 for place in range(2)] for pair in range(4)]
    pairs = torch.stack([torch.stack(both, -1) for both in levels], 2)  # [panels, depth / 8, 4, 16, 2]
    return pairs.flatten(1, 2).to(torch.uint8)


def unpack(packed: PackedMatrix) -> Tensor:
    """The float32 matrix that the products multiply by: [num_rows, depth]."""
    if packed.kind in (QUAD_INT8, QUAD_INT4):
        packed = _in_pairs(packed)
    if packed.kind in DTYPES:
        values = packed.values.transpose(2, 3).flatten(1, 2) if packed.kind == BFLOAT16 else packed.values
        return values.float().transpose(1, 2).reshape(-1, packed.depth)[: packed.num_rows].contiguous()
    groups = packed.depth // GROUP
    if packed.kind == INT8:
        steps = packed.scales.float().transpose(1, 2)  # [panels, 16, groups]
        levels = packed.values.view(-1, packed.depth // 2, LANES, 2).transpose(1, 2).reshape(-1, LANES, groups, GROUP)
        wide = levels.float() * steps.unsqueeze(-1)
    else:
        steps, offsets = packed.scales.float().permute(2, 0, 3, 1)
        pairs = _pairs_of_octets(packed.values)
        levels = pairs.transpose(1, 2).reshape(-1, LANES, groups, GROUP)
        wide = levels.float() * steps.unsqueeze(-1) + offsets.unsqueeze(-1)
    return wide.reshape(-1, packed.depth)[: packed.num_rows].contiguous()


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


def _pack_int8(weight: Tensor, levels: Tensor, scales: Tensor) -> PackedMatrix:
    """levels: int8 [num_rows, groups, 32]; scales: float16 [num_rows, groups]"""
    depth = levels.shape[1] * GROUP
    pairs = _panels(levels.reshape(-1, depth // 2, 2)).transpose(1, 2).contiguous()  # [panels, depth / 2, 16, 2]
    return PackedMatrix(INT8, weight.shape[0], depth, pairs, _panels(scales).transpose(1, 2).contiguous())


def _pack_int4(weight: Tensor, levels: Tensor, scales: Tensor, offsets: Tensor) -> PackedMatrix:
    """levels: uint8 [num_rows, groups, 32] below 16; scales, offsets: float16 [num_rows, groups]"""
    depth = levels.shape[1] * GROUP
    pairs = _panels(levels.reshape(-1, depth // 2, 2)).transpose(1, 2)  # [panels, depth / 2, 16, 2]
    both = torch.stack((_panels(scales).transpose(1, 2), _panels(offsets).transpose(1, 2)), dim=2).contiguous()
    return PackedMatrix(INT4, weight.shape[0], depth, _octets(pairs), both)


def _round_up(scales: Tensor) -> Tensor:
    """To float16, never down: a smaller step would push the largest level out of its range."""
    rounded = scales.half()
    return torch.where(rounded.float() < scales, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)


def _find_int4(weight: Tensor) -> PackedMatrix | None:
    groups = weight.shape[1] // GROUP
    levels = torch.empty(weight.shape[0], groups, GROUP, dtype=torch.uint8)
    scales = torch.empty(weight.shape[0], groups, dtype=torch.int16)
    offsets = torch.empty_like(scales)
    addresses = (part.data_ptr() for part in (weight, levels, scales, offsets))
    if weight.shape[1] % GROUP or not read_int4(*addresses, weight.shape[0] * groups):
        return None
    return _pack_int4(weight, levels, scales.view(torch.float16), offsets.view(torch.float16))


def _find_int8(weight: Tensor) -> PackedMatrix | None:
    groups = weight.shape[1] // GROUP
    levels = torch.empty(weight.shape[0], groups, GROUP, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], groups, dtype=torch.int16)
    addresses = (part.data_ptr() for part in (weight, levels, scales))
    if weight.shape[1] % GROUP or not read_int8(*addresses, weight.shape[0] * groups):
        return None
    return _pack_int8(weight, levels, scales.view(torch.float16))
