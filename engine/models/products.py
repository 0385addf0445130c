"""Matrix products with packed matrices as operations of a program, the rounding of their rows included."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.quantization.linear import Linear
from kernels.numba.core.formats import BFLOAT16, GROUP, INTEGERS, ROUNDED_BFLOAT16
from kernels.numba.ops.linear import FACTOR_BYTES, product_address
from kernels.numba.packing.packing import PackedMatrix, Stack
from kernels.numba.program.program import Operation, Step
from kernels.numba.program.team import operation


class ProductScratch(NamedTuple):
    """What rows become before a product."""

    rounded: Tensor  # as integers of 16 bits or fewer, or as bfloat16
    factors: Tensor  # of each group of integers
    ordered: Tensor  # in the order in which a matrix has its columns; empty where none has another than rows


def product_scratch(num_rows: int, depth: int, matrices: Iterable[Stack]) -> ProductScratch:
    groups = -(-depth // GROUP)
    parts = [part for matrix in matrices for part in matrix.parts if part.order is not None]
    return ProductScratch(
        torch.empty(num_rows, groups * GROUP, dtype=torch.int16),
        torch.empty(num_rows, groups, 4),
        torch.empty(num_rows, max((part.depth for part in parts), default=0)),
    )


@dataclass(frozen=True, slots=True)
class Products:
    """Writes the operations of matrix products, the rounding of rows to what they are multiplied as included."""

    num_threads: int
    rounds_to_bfloat16: bool

    def kind_with(self, kind: int) -> int:
        """The kind of products with a matrix of one: its own, unless rows are rounded for it."""
        rounded: int = ROUNDED_BFLOAT16
        return rounded if kind == BFLOAT16 and self.rounds_to_bfloat16 else kind

    def panels_at_once(self, num_panels: int) -> int:
        """Those of a unit of work: six units or so for each thread, so that all end at about the same time; an even
        number, for tiles of two."""
        return max(2, min(16, num_panels // (6 * self.num_threads) // 2 * 2))

    def operations(
        self,
        x: Tensor,
        matrix: Stack,
        out: Tensor,
        scratch: ProductScratch,
        *,
        adds: bool,
        rows: Step = Step.ROWS,
    ) -> list[list[int]]:
        """out = x @ matrix.T, or added to out."""
        operations: list[list[int]] = []
        taken: tuple[Operation | None, int] | None = None  # what the rows became for the part before: they may stay so
        source, factors, first = x.data_ptr(), 0, 0
        for part in matrix.parts:
            kind = self.kind_with(part.kind)
            wanted = rounding_of(kind), 0 if part.order is None else part.order.data_ptr()
            if wanted != taken:
                taken = wanted
                reorder = [] if part.order is None else [_permute(x, part.order, scratch.ordered, rows)]
                made, source, factors = self.rounded(reorder, x, wanted[0], scratch, rows=rows)
                operations += made
            operations.append(self._product(part, kind, (source, factors), out, first, adds=adds, rows=rows))
            first += part.num_rows
        return operations

    def rounded(
        self, reorder: list[list[int]], x: Tensor, rounding: Operation | None, scratch: ProductScratch, *, rows: Step
    ) -> tuple[list[list[int]], int, int]:
        """(operations, address of the rows that come of them, and of their factors). reorder: what writes x, in another
        order, to where the scratch has room for that"""
        operations, source = list(reorder), scratch.ordered.data_ptr() if reorder else x.data_ptr()
        if rounding is None:
            return operations, source, 0
        narrow, factors = scratch.rounded.data_ptr(), scratch.factors.data_ptr()
        where = [narrow] if rounding == Operation.ROUND else [narrow, factors]
        operations.append(operation(rounding, source, *where, x.shape[1], rows=rows))
        return operations, narrow, factors

    def _product(
        self, part: PackedMatrix, kind: int, x: tuple[int, int], out: Tensor, first: int, *, adds: bool, rows: Step
    ) -> list[int]:
        """x: addresses of rows and of their factors; first: the column of out"""
        at_once = self.panels_at_once(part.num_panels)
        where = (part.values.data_ptr(), part.scales.data_ptr(), part.num_panels, at_once)
        multiply: list[int] = operation(
            Operation.MULTIPLY, product_address(kind), *x, part.depth, *where, out.data_ptr() + 4 * first,
            out.shape[1], int(adds), rows=rows,
        )  # fmt: skip
        return multiply


def _permute(x: Tensor, order: Tensor, out: Tensor, rows: Step) -> list[int]:
    permute: list[int] = operation(
        Operation.PERMUTE, x.data_ptr(), order.data_ptr(), out.data_ptr(), x.shape[1], rows=rows
    )
    return permute


def row_bytes(kind: int, depth: int) -> tuple[int, int]:
    """Of a row as such products take it, and of its factors."""
    if kind in INTEGERS:
        return depth * 4 // INTEGERS[kind].depths, depth // GROUP * FACTOR_BYTES
    return depth * (2 if kind == ROUNDED_BFLOAT16 else 4), 0


def rounding_of(kind: int) -> Operation | None:
    """What rows go through before such a product."""
    if kind in INTEGERS:
        return Operation.QUANTISE if INTEGERS[kind].depths == 2 else Operation.QUANTISE_TO_BYTES
    rounded: int = ROUNDED_BFLOAT16
    return Operation.ROUND if kind == rounded else None


def packed(linear: object) -> Stack:
    assert isinstance(linear, Linear)
    assert isinstance(linear.weight, Stack)
    return linear.weight
