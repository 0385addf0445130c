"""Products with packed matrices against float64, and the rows' independence of one another, in every format."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from kernels.numba.core.formats import (
    BFLOAT16,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    GROUP,
    INTEGERS,
    NAMES,
    QUAD_INT4,
    QUAD_INT8,
    ROUNDED_BFLOAT16,
)
from kernels.numba.core.lanes import LANES
from kernels.numba.ops.linear import BLOCK_DEPTH, BLOCK_ROWS, product_address
from kernels.numba.packing.packing import PackedMatrix, _factors, pack, pack_levels, unpack
from kernels.numba.program.program import Operation
from tests.support.quantised import random_float8, random_levels

PRODUCTS = {**NAMES, ROUNDED_BFLOAT16: "rounded bfloat16"}
KINDS = pytest.mark.parametrize("kind", PRODUCTS, ids=PRODUCTS.values())
DEPTHS = (32, 96, 1024, 1056, 2 * BLOCK_DEPTH + 64)
UNIT = 2.0**-24  # half the distance of two float32 numbers, relative to them


class Product:
    """x @ matrix.T, and what it takes: rows rounded to integers for the integer formats.

    kind: the matrix's, or ROUNDED_BFLOAT16
    """

    def __init__(self, execute, op, matrix: PackedMatrix, kind: int | None = None) -> None:
        self.execute, self.op, self.matrix = execute, op, matrix
        self.kind = matrix.kind if kind is None else kind

    def __call__(
        self, x: Tensor, *, added_to: Tensor | None = None, num_threads: int = 1, panels_at_once: int = 4
    ) -> Tensor:
        """[rows, panels * 16]"""
        m, num_rows = self.matrix, x.shape[0]
        out = torch.full((num_rows, m.num_panels * LANES), torch.nan) if added_to is None else added_to.clone()
        source, factors, operations = x.contiguous(), torch.empty(0), []
        if self.kind in INTEGERS:
            source, factors = self.empty_rounding(num_rows)
            operations.append(self.op(self.quantise, x.contiguous(), source, factors, m.depth))
        elif self.kind == ROUNDED_BFLOAT16:
            source = torch.empty(num_rows, m.depth, dtype=torch.bfloat16)
            operations.append(self.op(Operation.ROUND, x.contiguous(), source, m.depth))
        where = (m.values, m.scales, m.num_panels, panels_at_once, out, out.shape[1], int(added_to is not None))
        operations.append(self.op(Operation.MULTIPLY, product_address(self.kind), source, factors, m.depth, *where))
        self.execute(operations, num_rows=num_rows, num_threads=num_threads)
        return out

    @property
    def in_bytes(self) -> bool:
        return INTEGERS[self.kind].depths == 4

    @property
    def quantise(self) -> Operation:
        return Operation.QUANTISE_TO_BYTES if self.in_bytes else Operation.QUANTISE

    def empty_rounding(self, num_rows: int) -> tuple[Tensor, Tensor]:
        dtype, depth = torch.uint8 if self.in_bytes else torch.int16, self.matrix.depth
        return torch.empty(num_rows, depth, dtype=dtype), torch.empty(num_rows, depth // GROUP, 4)

    def rounded(self, x: Tensor) -> Tensor:
        """The rows as this format's products take them, in float64."""
        if self.kind == ROUNDED_BFLOAT16:
            return x.bfloat16().double()
        if self.kind not in INTEGERS:
            return x.double()
        integers, factors = self.empty_rounding(len(x))
        self.execute([self.op(self.quantise, x.contiguous(), integers, factors, x.shape[1])], num_rows=len(x))
        shifted = integers.double().view(len(x), -1, GROUP)
        if self.in_bytes:
            shifted += factors[..., 1:2].double()
        return (shifted * factors[..., :1].double()).view(x.shape)


def make_matrix(num_rows: int, depth: int, kind: int) -> PackedMatrix:
    """Of about this depth."""
    if kind == FLOAT8:
        return pack_levels(random_float8(num_rows, depth), kind)
    if kind not in INTEGERS:
        return pack(torch.randn(num_rows, depth), BFLOAT16 if kind == ROUNDED_BFLOAT16 else kind)
    step = INTEGERS[kind].depth_multiple
    return pack_levels(random_levels(kind, num_rows, -(-depth // step) * step), kind)


def magnitude(matrix: PackedMatrix) -> Tensor:
    """The most that is added up for each element: a level times its scale and an offset, where there is one."""
    dense = unpack(matrix).double()
    weights = INTEGERS.get(matrix.kind)
    if weights is None or not weights.has_offsets:
        return dense.abs()
    _, offsets = _factors(matrix, weights)
    assert offsets is not None
    offsets = offsets.double().flatten(0, 1)[: matrix.num_rows].repeat_interleave(weights.per_scale, 1)
    return (dense - offsets).abs() + offsets.abs()


def assert_within_rounding(product: Tensor, x: Tensor, matrix: PackedMatrix, initial: Tensor | None = None) -> None:
    """n roundings are off by less than 4 sqrt(n) units of the sum of all sizes, all but surely (Higham and Mary, 2019,
    "A New Approach to Probabilistic Rounding Error Analysis"). One element left out is several times that."""
    wide = unpack(matrix).double()
    expected, sizes = x @ wide.T, x.abs() @ magnitude(matrix).T
    if initial is not None:
        expected, sizes = expected + initial.double(), sizes + initial.double().abs()
    error = (product.double()[:, : matrix.num_rows] - expected).abs()
    assert (error <= 4 * matrix.depth**0.5 * UNIT * sizes).all()


@KINDS
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_product_is_with_the_unpacked_matrix(execute, op, kind: int, depth: int) -> None:
    rng = random.Random(depth)
    for num_panels in (1, 2, 3, 5):
        num_features = num_panels * LANES - rng.randrange(LANES)
        matrix = make_matrix(num_features, depth, kind)
        assert matrix.num_panels == num_panels
        product = Product(execute, op, matrix, kind)
        for num_rows in (1, 2, 3, 7, rng.randrange(8, 60)):
            x = torch.randn(num_rows, matrix.depth)
            at_once = rng.choice([2, 4, 16])
            out = product(x, panels_at_once=at_once)
            assert_within_rounding(out, product.rounded(x), matrix)
            assert (out[:, num_features:] == 0).all()  # of the rows that fill up the last panel


@KINDS
def test_every_number_of_rows_gives_the_same_bits(execute, op, kind: int) -> None:
    matrix = make_matrix(5 * LANES, BLOCK_DEPTH + 96, kind)
    product = Product(execute, op, matrix, kind)
    x = torch.randn(200, matrix.depth)
    together = product(x)
    assert_within_rounding(together, product.rounded(x), matrix)
    for num_rows in (*range(1, 30), BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS, 199):
        assert torch.equal(product(x[-num_rows:]), together[-num_rows:]), num_rows
    for row in random.Random(kind).sample(range(200), 20):
        assert torch.equal(product(x[row : row + 1]), together[row : row + 1]), row


@KINDS
def test_threads_and_the_cut_into_units_do_not_change_a_bit(execute, op, kind: int) -> None:
    matrix = make_matrix(11 * LANES, 288, kind)
    product = Product(execute, op, matrix, kind)
    for num_rows in (1, 7, 130):
        x = torch.randn(num_rows, matrix.depth)
        alone = product(x)
        for num_threads, panels_at_once in ((1, 2), (3, 2), (3, 4), (3, 16)):
            others = product(x, num_threads=num_threads, panels_at_once=panels_at_once)
            assert torch.equal(others, alone)


@KINDS
def test_a_product_is_added_to_what_is_there(execute, op, kind: int) -> None:
    for depth in (64, BLOCK_DEPTH, BLOCK_DEPTH + 32):
        matrix = make_matrix(3 * LANES, depth, kind)
        product = Product(execute, op, matrix, kind)
        x, residual = torch.randn(9, matrix.depth), torch.randn(9, 3 * LANES)
        total = product(x, added_to=residual)
        assert_within_rounding(total, product.rounded(x), matrix, residual)
        if matrix.depth <= BLOCK_DEPTH:  # one block: the whole sum is taken first
            assert torch.equal(total, residual + product(x))
        assert torch.equal(total[4:5], product(x[4:5], added_to=residual[4:5]))


@pytest.mark.parametrize("kind", [QUAD_INT8, QUAD_INT4], ids=("int8", "int4"))
def test_sums_of_bytes_are_exact_at_their_largest(execute, op, kind: int) -> None:
    """Whole numbers in, scaled so that they stay what they are: of each group the extremes, 255 times 15 or 127."""
    depth, num_rows = 3 * GROUP, 14
    largest = 127 if kind == QUAD_INT8 else 15
    weight = torch.full((2 * LANES, depth), float(largest))
    weight[::2, ::2] = -largest if kind == QUAD_INT8 else 0.0
    weight[1::2, -1] = 0.0  # a span, for the step of int4
    matrix = pack(weight, kind)
    assert torch.equal(unpack(matrix), weight)
    assert_exact_at_extremes(execute, op, matrix, num_rows)


@pytest.mark.parametrize("kind", INTEGERS, ids=(one.name for one in INTEGERS.values()))
def test_sums_of_the_largest_levels_do_not_overflow(execute, op, kind: int) -> None:
    """Every level at its largest, or at its smallest in every other row, and scales that keep them whole numbers."""
    weights, depth = INTEGERS[kind], 256
    rows = random_levels(kind, 2 * LANES, depth)
    levels = torch.full_like(rows.levels, 127 if weights.bits == 8 else (1 << weights.bits) - 1)
    levels[::2] = -127 if weights.bits == 8 else 0
    factors, commons = torch.ones_like(rows.factors), None if rows.commons is None else torch.ones_like(rows.commons)
    matrix = pack_levels(replace(rows, levels=levels, factors=factors, commons=commons), kind)
    assert_exact_at_extremes(execute, op, matrix, num_rows=14)


def assert_exact_at_extremes(execute, op, matrix: PackedMatrix, num_rows: int) -> None:
    x = torch.full((num_rows, matrix.depth), 254.0)
    x[:, 1::3] = 0.0
    x[num_rows // 2 :] *= -1
    product = Product(execute, op, matrix)
    out = product(x)
    expected = x.double() @ unpack(matrix).double().T
    if product.in_bytes:
        assert torch.equal(out.double(), expected)
    else:
        assert_within_rounding(out, product.rounded(x), matrix)


@pytest.mark.parametrize(
    ("kind", "depth"), [*product((FLOAT32, FLOAT16), (1, 17, 1030)), (BFLOAT16, 2), (BFLOAT16, 1030)]
)
def test_float_formats_take_any_depth_and_pairs_an_even_one(execute, op, kind: int, depth: int) -> None:
    matrix = pack(torch.randn(2 * LANES, depth), kind)
    x = torch.randn(7, depth)
    assert_within_rounding(Product(execute, op, matrix)(x), x.double(), matrix)
