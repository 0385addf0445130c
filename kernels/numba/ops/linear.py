"""Matrix products with packed weights. A unit of work, done by one thread, is a block of rows by some panels.

Each kind of product is a kernel of its own, which is compiled, or read from the cache, when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from numba import njit, types

from kernels.numba.core.formats import (
    BFLOAT16,
    FLOAT8,
    FLOAT8_SCALE_BYTES,
    FLOAT16,
    FLOAT32,
    GROUP,
    INT4,
    INT8,
    INTEGERS,
    QUAD_INT4,
    QUAD_INT8,
    ROUNDED_BFLOAT16,
)
from kernels.numba.core.integer_tiles import (
    MIN_ROWS_TO_UNPACK,
    UNPACKED_TILES,
    multiply_integers,
    multiply_unpacked,
    must_unpack,
    tiles_of,
    unpack_levels,
)
from kernels.numba.core.lanes import LANES
from kernels.numba.core.processor import TileRows
from kernels.numba.core.tiles import (
    FLOAT_TILES,
    multiply_bfloat16,
    multiply_float8,
    multiply_float16,
    multiply_float32,
    multiply_rounded_bfloat16,
    rows_of_next_tile,
    shape_of_next_tile,
)
from kernels.numba.kernel_cache import address_of, by_address, kernel, named

BLOCK_ROWS = 96  # rows that stay in the L2 cache while they are multiplied by one panel after the other
BLOCK_DEPTH = 1024  # elements of the depth that are summed in registers at once; a multiple of SUPER_GROUP
SCRATCH_BYTES = BLOCK_DEPTH * LANES * 2  # of a thread: a panel of levels that is unpacked once for all tiles
FACTOR_BYTES = 16  # of each GROUP elements of a row of integers
USUAL = (FLOAT32, BFLOAT16, ROUNDED_BFLOAT16, FLOAT16, INT8, INT4, QUAD_INT8, QUAD_INT4)  # compiled at installation

_SIGNATURE = types.void(*[types.int64] * 13)
call_product = by_address(_SIGNATURE)


class _Product(NamedTuple):
    """What products of one kind are made of. Bits are of an element, bytes of 32 depths.

    multiply: (rows, panels, x, depth, factors, w, scales, count, out, ldo, adds), addresses of the tile's first row,
    panel and depth: one tile over `count` elements of the depth
    unpack: (w, scratch, count), the levels of a panel; multiply_unpacked: as `multiply`, with those
    """

    name: str
    row_bits: int
    weight_bits: int
    factor_bytes: int
    scale_bytes: int
    tiles: TileRows
    multiply: Callable[..., None]
    unpack: Callable[..., None] | None = None
    multiply_unpacked: Callable[..., None] | None = None


def _of_floats(name: str, tile: Callable[..., None], *, row_bits: int, weight_bits: int) -> _Product:
    size = weight_bits // 8

    @njit(inline="always")  # as the next ones: tiles are compiled where they are called
    def multiply(rows, panels, x, depth, factors, w, scales, count, out, ldo, adds):
        stride = depth * LANES
        tile((rows, panels, x, depth, w, LANES, stride, count, panels * stride * size, out, ldo, adds))

    return _Product(name, row_bits, weight_bits, 0, 0, FLOAT_TILES, multiply)


def _of_float8() -> _Product:
    tile = multiply_float8

    @njit(inline="always")
    def multiply(rows, panels, x, depth, factors, w, scales, count, out, ldo, adds):
        stride, scale_stride = depth * LANES, depth // GROUP * FLOAT8_SCALE_BYTES
        tile((rows, panels, x, depth, w, stride, scales, scale_stride, count // GROUP, panels * stride, out, ldo, adds))

    return _Product("float8", 32, 8, 0, FLOAT8_SCALE_BYTES, FLOAT_TILES, multiply)


def _of_integers(kind: int) -> _Product:
    weights = INTEGERS[kind]
    group_bytes, scale_bytes = weights.group_bytes, weights.scale_bytes
    tile = multiply_integers(weights)

    @njit(inline="always")
    def multiply(rows, panels, x, depth, factors, w, scales, count, out, ldo, adds):
        groups = depth // GROUP
        stride = groups * group_bytes
        tile(
            (rows, panels, x, depth, factors, groups, w, stride, scales, groups * scale_bytes, count // GROUP,
             panels * stride, out, ldo, adds)
        )  # fmt: skip

    name = weights.name.replace(", by activations of 8 bits", " x 8 bits")
    sizes = (32 // weights.depths, weights.bits, FACTOR_BYTES, scale_bytes, tiles_of(weights))
    if not must_unpack(weights):
        return _Product(name, *sizes, multiply)
    unpack_groups, unpacked_tile = unpack_levels(weights), multiply_unpacked(weights)

    @njit(inline="always")
    def unpack(w, scratch, count):
        unpack_groups(w, scratch, count // GROUP)

    @njit(inline="always")
    def multiply_levels(rows, panels, x, depth, factors, w, scales, count, out, ldo, adds):
        groups = depth // GROUP
        unpacked_tile(
            (rows, panels, x, depth, factors, groups, w, 0, scales, groups * scale_bytes, count // GROUP, 0, out, ldo,
             adds)
        )  # fmt: skip

    return _Product(name, *sizes, multiply, unpack, multiply_levels)


def _product(kind: int) -> _Product:
    if kind == FLOAT32:
        return _of_floats("float32", multiply_float32, row_bits=32, weight_bits=32)
    if kind == FLOAT16:
        return _of_floats("float16", multiply_float16, row_bits=32, weight_bits=16)
    if kind == BFLOAT16:
        return _of_floats("bfloat16", multiply_bfloat16, row_bits=32, weight_bits=16)
    if kind == FLOAT8:
        return _of_float8()
    if kind == ROUNDED_BFLOAT16:
        return _of_floats("rounded bfloat16", multiply_rounded_bfloat16, row_bits=16, weight_bits=16)
    return _of_integers(kind)


def _tile_loop(product: _Product) -> Callable[..., None]:
    """(rows, x, factors, depth, w, scales, panels, out, ldo, adds, count, scratch): the tiles of a block of rows and a
    run of panels, over `count` elements of the depth; addresses of the first of each."""
    row_bits, weight_bits, tiles = product.row_bits, product.weight_bits, product.tiles
    factor_bytes, scale_bytes, multiply = product.factor_bytes, product.scale_bytes, product.multiply

    @njit(inline="always")
    def packed_panels(rows, x, factors, depth, w, scales, num_panels, out, ldo, adds, count, scratch):
        groups, panel = depth // GROUP, 0
        while panel < num_panels:
            panels, most = shape_of_next_tile(rows, num_panels - panel, tiles)
            row = 0
            while row < rows:
                tile = rows_of_next_tile(rows - row, most)
                multiply(
                    tile, panels, x + row * (depth * row_bits // 8), depth, factors + row * groups * factor_bytes,
                    w + panel * (depth * LANES * weight_bits // 8), scales + panel * groups * scale_bytes, count,
                    out + (row * ldo + panel * LANES) * 4, ldo, adds,
                )  # fmt: skip
                row += tile
            panel += panels

    if product.unpack is None or product.multiply_unpacked is None:
        return packed_panels
    unpack, multiply_levels, tallest = product.unpack, product.multiply_unpacked, UNPACKED_TILES.one_panel

    @njit(inline="always")
    def unpacked_panels(rows, x, factors, depth, w, scales, num_panels, out, ldo, adds, count, scratch):
        if rows < MIN_ROWS_TO_UNPACK:
            packed_panels(rows, x, factors, depth, w, scales, num_panels, out, ldo, adds, count, scratch)
            return
        groups = depth // GROUP
        for panel in range(num_panels):
            unpack(w + panel * (depth * LANES * weight_bits // 8), scratch, count)
            row = 0
            while row < rows:
                tile = rows_of_next_tile(rows - row, tallest)
                multiply_levels(
                    tile, 1, x + row * (depth * row_bits // 8), depth, factors + row * groups * factor_bytes,
                    scratch, scales + panel * groups * scale_bytes, count, out + (row * ldo + panel * LANES) * 4, ldo,
                    adds,
                )  # fmt: skip
                row += tile

    return unpacked_panels


@cache
def product_kernel(kind: int):
    """The kernel of products of one kind: one unit of out (+)= x @ w.T.

    There are ceil(num_panels / panels_at_once) units for each BLOCK_ROWS rows.
    x: float32 [rows, depth], or for ROUNDED_BFLOAT16 bfloat16, or for integers int16 with factors as `quantise_rows`
    leaves them, or for those in quads uint8 as `quantise_rows_to_bytes` does; out: float32, ldo elements a row
    scratch: SCRATCH_BYTES of this thread
    """
    product = _product(kind)
    row_bits, weight_bits, factor_bytes, scale_bytes = product[1:5]
    multiply_panels = _tile_loop(product)

    def multiply_unit(unit, x, factors, rows, depth, w, scales, num_panels, panels_at_once, out, ldo, adds, scratch):
        runs, groups = -(-num_panels // panels_at_once), depth // GROUP
        block, run = unit // runs, unit % runs
        first_row, first_panel = block * BLOCK_ROWS, run * panels_at_once
        x += first_row * (depth * row_bits // 8)
        factors += first_row * groups * factor_bytes
        w += first_panel * (depth * LANES * weight_bits // 8)
        scales += first_panel * groups * scale_bytes
        out += (first_row * ldo + first_panel * LANES) * 4
        start = 0
        while start < depth:
            group = start // GROUP
            multiply_panels(
                min(BLOCK_ROWS, rows - first_row), x + start * row_bits // 8, factors + group * factor_bytes, depth,
                w + start * LANES * weight_bits // 8, scales + group * scale_bytes,
                min(panels_at_once, num_panels - first_panel), out, ldo, 1 if adds != 0 or start > 0 else 0,
                min(BLOCK_DEPTH, depth - start), scratch,
            )  # fmt: skip
            start += BLOCK_DEPTH

    return kernel(_SIGNATURE)(named(multiply_unit, f"multiply {product.name}"))


def product_address(kind: int) -> int:
    """Of the `product_kernel`, as operations name it."""
    return address_of(product_kernel(kind))


def compile_usual_products() -> None:
    """Compiles those that most models have, or reads them from the cache. Others wait for a model that has them."""
    for kind in USUAL:
        product_kernel(kind)
