"""Products with packed matrices against float64, and the rows' independence of one another, in every format."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from torch import Tensor

from kernels.numba.core.formats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    IN_QUADS,
    INT4,
    INT8,
    NAMES,
    QUAD_INT4,
    QUAD_INT8,
    ROUNDED_BFLOAT16,
)
from kernels.numba.core.lanes import GROUP, LANES
from kernels.numba.ops.linear import BLOCK_DEPTH, BLOCK_ROWS
from kernels.numba.packing.packing import PackedMatrix, in_quads, pack, unpack
from kernels.numba.program.program import Operation

PRODUCTS = {**NAMES, ROUNDED_BFLOAT16: "rounded bfloat16"}
KINDS = pytest.mark.parametrize("kind", PRODUCTS, ids=PRODUCTS.values())
ROUNDED = (INT8, INT4)
OF_QUADS = {quads: kind for kind, quads in IN_QUADS.items()}
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
        source, scales, operations = x.contiguous(), torch.empty(0), []
        if self.kind in ROUNDED:
            source, scales = empty_rounding(num_rows, m.depth)
            operations.append(self.op(Operation.QUANTISE, x.contiguous(), source, scales, m.depth))
        elif self.kind in OF_QUADS:
            source, scales = empty_bytes(num_rows, m.depth)
            operations.append(self.op(Operation.QUANTISE_TO_BYTES, x.contiguous(), source, scales, m.depth))
        elif self.kind == ROUNDED_BFLOAT16:
            source = torch.empty(num_rows, m.depth, dtype=torch.bfloat16)
            operations.append(self.op(Operation.ROUND, x.contiguous(), source, m.depth))
        where = (m.values, m.scales, m.num_panels, panels_at_once, out, out.shape[1], int(added_to is not None))
        operations.append(self.op(Operation.MULTIPLY, self.kind, source, scales, m.depth, *where))
        self.execute(operations, num_rows=num_rows, num_threads=num_threads)
        return out

    def rounded(self, x: Tensor) -> Tensor:
        """The rows as this format's products take them, in float64."""
        if self.kind == ROUNDED_BFLOAT16:
            return x.bfloat16().double()
        if self.kind in OF_QUADS:
            integers, factors = empty_bytes(*x.shape)
            quantise = self.op(Operation.QUANTISE_TO_BYTES, x.contiguous(), integers, factors, x.shape[1])
            self.execute([quantise], num_rows=x.shape[0])
            shifted = integers.double().view(x.shape[0], -1, GROUP) + factors[..., 1:2].double()
            return (shifted * factors[..., :1].double()).view(x.shape)
        if self.kind not in ROUNDED:
            return x.double()
        integers, scales = empty_rounding(*x.shape)
        quantise = self.op(Operation.QUANTISE, x, integers, scales, x.shape[1])
        self.execute([quantise], num_rows=x.shape[0])
        groups = integers.double().view(x.shape[0], -1, GROUP) * scales[..., :1].double()
        return groups.view(x.shape)


def packed(weight: Tensor, kind: int) -> PackedMatrix:
    if kind in OF_QUADS:
        return in_quads(pack(weight, OF_QUADS[kind]))
    return pack(weight, BFLOAT16 if kind == ROUNDED_BFLOAT16 else kind)


def empty_rounding(num_rows: int, depth: int) -> tuple[Tensor, Tensor]:
    return torch.empty(num_rows, depth, dtype=torch.int16), torch.empty(num_rows, depth // GROUP, 2)


def empty_bytes(num_rows: int, depth: int) -> tuple[Tensor, Tensor]:
    return torch.empty(num_rows, depth, dtype=torch.uint8), torch.empty(num_rows, depth // GROUP, 4)


def magnitude(matrix: PackedMatrix) -> Tensor:
    """The most that is added up for each element. An int4 weight is a level times a scale, and an offset, each of
    which may be as large as the group's largest weight, or twice that."""
    sizes = unpack(matrix).double().abs()
    if matrix.kind not in (INT4, QUAD_INT4):
        return sizes
    groups = sizes.view(matrix.num_rows, -1, GROUP)
    return 3 * groups.amax(-1, keepdim=True).expand_as(groups).reshape(sizes.shape)


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
        matrix = packed(torch.randn(num_features, depth), kind)
        assert matrix.num_panels == num_panels
        product = Product(execute, op, matrix, kind)
        for num_rows in (1, 2, 3, 7, rng.randrange(8, 60)):
            x = torch.randn(num_rows, depth)
            at_once = rng.choice([2, 4, 16])
            out = product(x, panels_at_once=at_once)
            assert_within_rounding(out, product.rounded(x), matrix)
            assert (out[:, num_features:] == 0).all()  # of the rows that fill up the last panel


@KINDS
def test_every_number_of_rows_gives_the_same_bits(execute, op, kind: int) -> None:
    matrix = packed(torch.randn(5 * LANES, BLOCK_DEPTH + 96), kind)
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
    product = Product(execute, op, packed(torch.randn(11 * LANES, 288), kind), kind)
    for num_rows in (1, 7, 130):
        x = torch.randn(num_rows, 288)
        alone = product(x)
        for num_threads, panels_at_once in ((1, 2), (3, 2), (3, 4), (3, 16)):
            others = product(x, num_threads=num_threads, panels_at_once=panels_at_once)
            assert torch.equal(others, alone)


@KINDS
def test_a_product_is_added_to_what_is_there(execute, op, kind: int) -> None:
    for depth in (64, BLOCK_DEPTH, BLOCK_DEPTH + 32):
        matrix = packed(torch.randn(3 * LANES, depth), kind)
        product = Product(execute, op, matrix, kind)
        x, residual = torch.randn(9, depth), torch.randn(9, 3 * LANES)
        total = product(x, added_to=residual)
        assert_within_rounding(total, product.rounded(x), matrix, residual)
        if depth <= BLOCK_DEPTH:  # one block: the whole sum is taken first
            assert torch.equal(total, residual + product(x))
        assert torch.equal(total[4:5], product(x[4:5], added_to=residual[4:5]))


@pytest.mark.parametrize("kind", OF_QUADS, ids=map(NAMES.get, OF_QUADS.values()))
def test_sums_of_bytes_are_exact_at_their_largest(execute, op, kind: int) -> None:
    """Whole numbers in, scaled so that they stay what they are: of each group the extremes, 255 times 15 or 127."""
    depth, num_rows = 3 * GROUP, 14
    largest = 127 if kind == QUAD_INT8 else 15
    weight = torch.full((2 * LANES, depth), float(largest))
    weight[::2, ::2] = -largest if kind == QUAD_INT8 else 0.0
    weight[1::2, -1] = 0.0  # a span, for the step of int4
    matrix = packed(weight, kind)
    assert torch.equal(unpack(matrix), weight)
    x = torch.full((num_rows, depth), 254.0)
    x[:, 1::3] = 0.0
    x[num_rows // 2 :] *= -1
    out = Product(execute, op, matrix, kind)(x)
    assert torch.equal(out.double(), x.double() @ weight.double().T)


@pytest.mark.parametrize(
    ("kind", "depth"), [*product((FLOAT32, FLOAT16), (1, 17, 1030)), (BFLOAT16, 2), (BFLOAT16, 1030)]
)
def test_float_formats_take_any_depth_and_pairs_an_even_one(execute, op, kind: int, depth: int) -> None:
    matrix = pack(torch.randn(2 * LANES, depth), kind)
    x = torch.randn(7, depth)
    assert_within_rounding(Product(execute, op, matrix)(x), x.double(), matrix)
