"""Matrices of a checkpoint that are integers in groups, or small floats: the compiled format that holds them, if any.

Groups of 64, 128 or a whole row become groups of 32 with the same scale. Scales that are no numbers of float16 are
rounded to it, where weights may be: each weight is then within 2^-11 of what it was, as in float16. What no format of
integers holds is read as floats, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.quantization.bit_packing import unpack_bits
from engine.quantization.stored_levels import StoredLevels
from kernels.numba.core.formats import (
    FLOAT8,
    FP4,
    FP4_BOOK,
    FP4_STEPS,
    GROUP,
    INT4_ZEROS,
    INT6,
    INT8,
    INT8_ZEROS,
    INTEGERS,
    MXFP4,
    NF4,
    NF4_BOOK,
    NF4_STEPS,
    NVFP4,
    Q4_0,
    Q5_0,
    Levels,
)

_PIECE = 1 << 20  # elements that are computed at a time
_BOOKS = {NF4: (NF4_BOOK, NF4_STEPS), FP4: (FP4_BOOK, FP4_STEPS)}  # and what makes integers of their numbers
_NAN = 0x7F  # of FP8, but for its sign
_AROUND_ZERO = (Q4_0, Q5_0, INT6)  # whose levels less a zero are from -zero to zero - 1; the smallest first

ReadRows = Callable[[int, int], Tensor]  # (first row, last + 1) -> those rows


class StoredMatrix(StoredLevels):
    """One whose floats are computed some rows at a time, whatever is asked for."""

    def dense(self, start: int, stop: int) -> Tensor:
        step = max(1, _PIECE // max(1, self.shape[1]))
        if stop - start <= step:
            return self.piece(start, stop)
        out = torch.empty(stop - start, self.shape[1], device="cpu")
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = self.piece(first, last)
        return out

    def piece(self, start: int, stop: int) -> Tensor:
        """The definition: a few rows in float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class StoredFloats(StoredMatrix):
    """Small floats, or numbers of a code book, which no kernel of ours multiplies. read: a few rows in float32"""

    read: ReadRows

    def levels(self, start: int, stop: int) -> Levels:
        raise AssertionError("no format of integers holds it")

    def piece(self, start: int, stop: int) -> Tensor:
        return self.read(start, stop)


@dataclass(frozen=True)
class ScaledFloats(StoredFloats):
    """8-bit floats. values: float8_e4m3fn; scales: float32 of the matrix [1, 1], of rows [num_rows, 1] or of blocks

    read_scales: of some rows and each 32 of their columns, [n, depth / 32]; where `kind` is FLOAT8
    """

    values: Tensor
    scales: Tensor
    read_scales: ReadRows

    def levels(self, start: int, stop: int) -> Levels:
        assert self.kind == FLOAT8
        bits = self.values[start:stop].view(torch.uint8)
        if bool(((bits & _NAN) == _NAN).any()):
            raise ValueError(f"a matrix ({self.label}) has weights that are no numbers; the file is damaged")
        return Levels(self.kind, bits, self.read_scales(start, stop).unsqueeze(-1))


@dataclass(frozen=True)
class BookPlaces(StoredMatrix):
    """Places in a book of 16 numbers, and a factor for each `block_size` weights, counted through the whole matrix.

    codes: of some rows, uint8 [n, depth] below 16; book: float32 [16]; factors: float32 [blocks]
    """

    codes: ReadRows
    book: Tensor
    factors: Tensor
    block_size: int

    @classmethod
    def of(
        cls, shape: tuple[int, int], label: str, codes: ReadRows, book: Tensor, factors: Tensor, *, block_size: int
    ) -> BookPlaces:
        """With the compiled format that holds it, if one does: within 2.9e-4 of each number of nf4, exactly of fp4."""
        fits = shape[1] % GROUP == 0 and block_size % GROUP == 0
        known = [kind for kind, (numbers, _) in _BOOKS.items() if _is_book(book, numbers)]
        return cls(shape, known[0] if known and fits else None, codes, book, factors, block_size, label=label)

    def levels(self, start: int, stop: int) -> Levels:
        assert self.kind is not None
        scales = self.factors[self._blocks(start, stop, GROUP)] / _BOOKS[self.kind][1]
        return Levels(self.kind, self.codes(start, stop), scales.unsqueeze(-1))

    def piece(self, start: int, stop: int) -> Tensor:
        return self.book[self.codes(start, stop).int()] * self.factors[self._blocks(start, stop, 1)]

    def _blocks(self, start: int, stop: int, step: int) -> Tensor:
        """The block of each `step` columns of some rows: int64 [n, depth / step]."""
        depth = self.shape[1]
        return torch.arange(start * depth, stop * depth, step, device="cpu").view(stop - start, -1) // self.block_size


def _is_book(book: Tensor, numbers: tuple[float, ...]) -> bool:
    """Whether it is this one, but for what writers round away."""
    return bool(torch.allclose(book.float(), torch.tensor(numbers, device="cpu"), rtol=1e-6, atol=1e-7))


@dataclass(frozen=True)
class FourBitFloats(StoredMatrix):
    """E2M1 numbers, whose twice is an integer: weight = twice(code) * scale.

    octets: uint8 [num_rows, depth / 2], the lower four bits first
    scales: half of what each group of 32 or 16 is multiplied by: [num_rows, groups], bfloat16 or float32
    """

    octets: Tensor
    scales: Tensor

    @classmethod
    def of(cls, label: str, octets: Tensor, scales: Tensor) -> FourBitFloats:
        depth = 2 * octets.shape[1]
        per_scale = depth // scales.shape[1]
        of_groups = {INTEGERS[kind].per_scale: kind for kind in (MXFP4, NVFP4)}
        kind = of_groups.get(per_scale) if depth % GROUP == 0 else None
        if kind is not None:
            scales = scales.to(getattr(torch, INTEGERS[kind].scales))
        return cls((octets.shape[0], depth), kind, octets, scales, label=label)

    def levels(self, start: int, stop: int) -> Levels:
        assert self.kind is not None
        factors = self.scales[start:stop].reshape(stop - start, self.shape[1] // GROUP, -1)
        return Levels(self.kind, self.codes(start, stop), factors)

    def codes(self, start: int, stop: int) -> Tensor:
        """uint8 [n, depth] below 16"""
        return unpack_bits(self.octets[start:stop], 4, self.shape[1])

    def piece(self, start: int, stop: int) -> Tensor:
        twice = torch.tensor(INTEGERS[NVFP4].table, dtype=torch.float32, device="cpu")
        values = twice[self.codes(start, stop).int()]
        grouped = values.view(stop - start, self.scales.shape[1], -1)
        product: Tensor = grouped.mul_(self.scales[start:stop].float().unsqueeze(-1)).flatten(1)
        return product


@dataclass(frozen=True)
class StoredIntegers(StoredMatrix):
    """Integers in groups along the depth: weight[n, order[k]] = (level[n, k] - zero[n, g]) * scale[n, g], g = group[k].

    scales: [num_rows, groups], floats as stored; zeros: integers likewise, or one for all
    group: [depth] int64, the group of each column, those of one group side by side
    order: [depth] int64, where each column belongs; None: where it is. Activation order (`desc_act`), undone at load
    read_levels: the integers of some rows, [n, depth], any integer dtype
    is_signed: levels are from -2^(bits - 1) on, else from 0 on; factor: multiplies all that, last
    """

    bits: int
    scales: Tensor
    zeros: Tensor | int
    group: Tensor
    read_levels: ReadRows
    is_signed: bool = False
    factor: float = 1.0

    @property
    def in_smallest_format(self) -> StoredIntegers:
        """The same, with the smallest format that holds it, if there is one."""
        return replace(self, kind=self._smallest())

    def levels(self, start: int, stop: int) -> Levels:
        chunks = self._group_of_chunk()
        assert self.kind is not None
        assert chunks is not None
        scales = self._scale_rows(start, stop).half()
        if INTEGERS[self.kind].has_zeros:
            levels, zeros = self.read_levels(start, stop), self._zero_rows(start, stop)
            if self.kind == INT8_ZEROS and not self.is_signed:
                levels, zeros = levels.to(torch.int16) - 128, zeros - 128
            both = torch.stack((scales, zeros.half()), -1)
            return Levels(self.kind, levels.to(torch.int8 if self.kind == INT8_ZEROS else torch.uint8), both[:, chunks])
        levels = self._signed_rows(start, stop)
        if self.kind == INT8:
            return Levels(self.kind, levels.to(torch.int8), scales[:, chunks].unsqueeze(-1))
        shifted = levels.add_(INTEGERS[self.kind].zero).to(torch.uint8)
        return Levels(self.kind, shifted, scales[:, chunks].unsqueeze(-1))

    def piece(self, start: int, stop: int) -> Tensor:
        scales = self._spread(self.scales[start:stop].float())
        found = self._signed_rows(start, stop).float().mul_(scales).mul_(self.factor)
        if self.order is None:
            return found
        placed = torch.empty_like(found)
        placed[:, self.order] = found
        return placed

    def _smallest(self) -> int | None:
        if self._group_of_chunk() is None or not _is_nearly_half(self._scale_rows(0, self.shape[0])):
            return None
        low, high = self._span()
        fitting = [kind for kind in _AROUND_ZERO if low >= -INTEGERS[kind].zero and high < INTEGERS[kind].zero]
        if self.bits <= 4 and not self.is_signed:
            fitting.append(INT4_ZEROS)
        if low >= -128 and high <= 127:
            fitting.append(INT8)
        if self.bits == 8:
            fitting.append(INT8_ZEROS)
        return min(fitting, key=lambda kind: INTEGERS[kind].num_bytes, default=None)

    def _span(self) -> tuple[int, int]:
        """The least and the largest that level - zero can be."""
        lowest = -(1 << (self.bits - 1)) if self.is_signed else 0
        highest = lowest + (1 << self.bits) - 1
        if isinstance(self.zeros, int):
            return lowest - self.zeros, highest - self.zeros
        least, most = self.zeros.aminmax()
        return lowest - int(most), highest - int(least)

    def _group_of_chunk(self) -> Tensor | None:
        """[depth / 32] int64, the group of each 32 columns in `order`; None where some of those are of several."""
        if self.shape[1] % GROUP:
            return None
        chunks = self.group.view(-1, GROUP)
        return chunks[:, 0] if bool((chunks == chunks[:, :1]).all()) else None

    def _signed_rows(self, start: int, stop: int) -> Tensor:
        """level - zero of some rows, in `order`: int16 [n, depth]."""
        levels = self.read_levels(start, stop).to(torch.int16)
        return levels.sub_(self._spread(self._zero_rows(start, stop)))

    def _zero_rows(self, start: int, stop: int) -> Tensor:
        """int16 [n, groups]"""
        if isinstance(self.zeros, int):
            return torch.full((stop - start, self.scales.shape[1]), self.zeros, dtype=torch.int16, device="cpu")
        return self.zeros[start:stop].to(torch.int16)

    def _scale_rows(self, start: int, stop: int) -> Tensor:
        """What levels are multiplied by: float32 [n, groups]."""
        return self.scales[start:stop].float() * self.factor

    def _spread(self, values: Tensor) -> Tensor:
        """Of each group -> of each column."""
        return values if values.shape[1] == 1 else values[:, self.group]


def even_groups(depth: int, group_size: int) -> Tensor:
    """The group of each column where each `group_size` columns are one; the last may have fewer."""
    return torch.arange(depth, device="cpu") // group_size


def _is_nearly_half(values: Tensor) -> bool:
    """Whether each is finite in float16, and within 2^-11."""
    half = values.half()
    is_near = (half.float() - values).abs() <= values.abs() * 2**-11
    return bool(half.isfinite().all()) and bool(is_near.all())
