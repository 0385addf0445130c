"""Register tiles: the micro-kernels of all matrix products, generated as LLVM vector instructions. Those of integers
are in `integer_tiles`, those of a paged cache in `paged_tiles`.

A tile multiplies a few rows by a few panels of 16 columns and keeps every sum in a register from the first element to
the last (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008, section 6.3). Vectors are
16 lanes wide whatever the machine has: LLVM splits them into two registers of AVX2, four of NEON, or one of AVX-512.
How many rows and panels fit the registers, and which instructions there are, `kernels.numba.core.processor` says.

The order of a sum depends on its row and its column alone, never on the shape of the tile: a row's result is the same,
bit for bit, however many rows are multiplied together.

Addresses are integers, strides count elements. The callers are compiled by Numba, which does not inline the tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from kernels.numba.core.formats import GROUP
from kernels.numba.core.lanes import (
    FLOAT,
    FLOATS,
    I8,
    I32,
    I64,
    INTS,
    LANES,
    Loop,
    call_by_name,
    define,
    fma,
    load,
    load_floats,
    splat,
    store,
)
from kernels.numba.core.processor import LINE, TileRows, features, level

FLOAT_TILES = level().floats


def write_sums(
    builder: ir.IRBuilder, sums: list[ir.Value], panels: int, out: ir.Value, ldo: ir.Value, adds: ir.Value
) -> None:
    """Stores the sums of a tile, row after row, at `out`, or adds them to the elements there."""
    is_added = builder.icmp_signed("!=", adds, I64(0))
    for index, total in enumerate(sums):
        row, panel = divmod(index, panels)
        offset = builder.add(builder.mul(ldo, I64(4 * row)), I64(4 * LANES * panel))
        address = builder.add(out, offset)
        with builder.if_else(is_added) as (then, otherwise):
            with then:
                store(builder, builder.fadd(load(builder, address, FLOATS, 4), total), address)
            with otherwise:
                store(builder, total, address)


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Prefetches the cache line of an address, which may be invalid, into the L2 cache.

    A tile asks for the weights of the next one while it computes. The hardware's prefetcher learns a stream anew in
    each page of 4 KiB, and a panel is hardly longer. Not into the L1 cache: what is on its way there holds one of its
    few miss buffers, 24 on Zen, which then bound a core's rate: 64 bytes * 24 / 0.1 us = 15 GB/s.
    """
    pointer = builder.inttoptr(address, I8.as_pointer())
    call_by_name(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(2), I32(1))


@intrinsic
def prefetch_line(typing_context, address):
    """Prefetches the cache line of an address: see `prefetch`."""

    def generate(context, builder, signature, arguments):
        prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def prefetch_span(builder: ir.IRBuilder, addresses: list[ir.Value], distance: ir.Value, num_bytes: int) -> None:
    """Prefetches so many bytes at a distance from each address."""
    for address in addresses:
        first = builder.add(address, distance)
        for line in range(0, num_bytes, LINE):
            prefetch(builder, builder.add(first, I64(line)))


def _float_tile(module: ir.Module, rows: int, panels: int, element: str) -> ir.Function:
    """(x, ldx, w, w_stride, panel_stride, depth, ahead, out, ldo, adds): the tile of float sums.

    x: float32 [rows, depth]; element i of column c of panel p is w[p * panel_stride + i * w_stride + c]
    ahead: bytes from each panel to the one that is prefetched meanwhile, see `prefetch`
    """
    function, is_new = define(module, f"float_tile_{rows}x{panels}_{element}", 10)
    if not is_new:
        return function
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    x, ldx, w, w_stride, panel_stride, depth, ahead, out, ldo, adds = function.args
    size = 4 if element == "float32" else 2
    zero = ir.Constant(FLOATS, [0.0] * LANES)
    x_rows = [builder.add(x, builder.mul(ldx, I64(4 * row))) for row in range(rows)]
    w_panels = [builder.add(w, builder.mul(panel_stride, I64(size * panel))) for panel in range(panels)]
    step = builder.mul(w_stride, I64(size))
    loop = Loop(builder, depth, [zero] * (rows * panels))
    offset = builder.mul(loop.index, step)
    prefetch_span(builder, w_panels, builder.add(ahead, offset), LINE)
    weights = [load_floats(builder, builder.add(base, offset), element) for base in w_panels]
    sums = []
    for row in range(rows):
        scalar = load(builder, builder.add(x_rows[row], builder.shl(loop.index, I64(2))), FLOAT, 4)
        broadcast = splat(builder, scalar)
        for panel in range(panels):
            sums.append(fma(builder, broadcast, weights[panel], loop.values[row * panels + panel]))
    sums = loop.close(sums)
    write_sums(builder, sums, panels, out, ldo, adds)
    builder.ret_void()
    return function


def _bfloat16_tile(module: ir.Module, rows: int, panels: int, element: str) -> ir.Function:
    """As `_float_tile`, of panels whose elements lie in pairs of depths, bfloat16 [depth / 2, 16, 2]; depth is even.

    element: of x: "float32", whose products are exact, or "bfloat16", in pairs too, which some processors multiply and
    add in one instruction
    """
    function, is_new = define(module, f"bfloat16_tile_{rows}x{panels}_{element}", 10)
    if not is_new:
        return function
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    x, ldx, w, _, panel_stride, depth, ahead, out, ldo, adds = function.args
    size = 4 if element == "float32" else 2
    zero = ir.Constant(FLOATS, [0.0] * LANES)
    x_rows = [builder.add(x, builder.mul(ldx, I64(size * row))) for row in range(rows)]
    w_panels = [builder.add(w, builder.mul(panel_stride, I64(2 * panel))) for panel in range(panels)]
    loop = Loop(builder, builder.ashr(depth, I64(1)), [zero] * (rows * panels))
    offset, x_offset = builder.mul(loop.index, I64(4 * LANES)), builder.mul(loop.index, I64(2 * size))
    prefetch_span(builder, w_panels, builder.add(ahead, offset), LINE)
    words = [load(builder, builder.add(base, offset), INTS, 4) for base in w_panels]
    pairs = [_widen_pair(builder, word) for word in words] if element == "float32" else []
    sums = []
    for row in range(rows):
        address = builder.add(x_rows[row], x_offset)
        totals = loop.values[row * panels : (row + 1) * panels]
        if element == "bfloat16":
            both = splat(builder, load(builder, address, I32, 2))
            sums += [add_bfloat16_products(builder, *terms, both) for terms in zip(totals, words, strict=True)]
            continue
        for place in (0, 1):
            broadcast = splat(builder, load(builder, builder.add(address, I64(4 * place)), FLOAT, 4))
            totals = [fma(builder, broadcast, pair[place], total) for pair, total in zip(pairs, totals, strict=True)]
        sums += totals
    sums = loop.close(sums)
    write_sums(builder, sums, panels, out, ldo, adds)
    builder.ret_void()
    return function


def _widen_pair(builder: ir.IRBuilder, words: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The two bfloat16 in each of 16 words as float32: the lower ones, and the upper ones."""
    low = builder.shl(words, ir.Constant(INTS, [16] * LANES))
    high = builder.and_(words, ir.Constant(INTS, [0xFFFF0000] * LANES))
    return builder.bitcast(low, FLOATS), builder.bitcast(high, FLOATS)


def add_bfloat16_products(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """total + the products of two bfloat16 in each of 16 words, the upper one first (x86: VDPBF16PS)."""
    if "avx512bf16" in features():
        return call_by_name(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, a, b)
    (a_low, a_high), (b_low, b_high) = _widen_pair(builder, a), _widen_pair(builder, b)
    return fma(builder, a_low, b_low, fma(builder, a_high, b_high, total))


def _float8_tile(module: ir.Module, rows: int, panels: int, element: str) -> ir.Function:
    """(x, ldx, w, panel_stride, scales, scale_stride, num_groups, ahead, out, ldo, adds): sums of products with 8-bit
    floats (e4m3), each of which is multiplied by its scale first.

    x: float32 [rows, num_groups * GROUP]; w: [num_groups * GROUP, 16] of a panel; scales: float32 [num_groups, 16], 2^8
    times those of the numbers; strides: bytes from panel to panel; ahead: as of `_float_tile`, for the scales too
    """
    function, is_new = define(module, f"float8_tile_{rows}x{panels}", 11)
    if not is_new:
        return function
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    x, ldx, w, panel_stride, scales, scale_stride, num_groups, ahead, out, ldo, adds = function.args
    x_rows = [builder.add(x, builder.mul(ldx, I64(4 * row))) for row in range(rows)]
    w_panels = [builder.add(w, builder.mul(panel_stride, I64(panel))) for panel in range(panels)]
    s_panels = [builder.add(scales, builder.mul(scale_stride, I64(panel))) for panel in range(panels)]
    outer = Loop(builder, num_groups, [ir.Constant(FLOATS, [0.0] * LANES)] * (rows * panels))
    of_scales = builder.mul(outer.index, I64(4 * LANES))
    factors = [load_floats(builder, builder.add(base, of_scales), "float32") for base in s_panels]
    prefetch_span(builder, s_panels, builder.add(builder.mul(scale_stride, I64(panels)), of_scales), LINE)
    first = builder.mul(outer.index, I64(GROUP * LANES))
    prefetch_span(builder, w_panels, builder.add(ahead, first), GROUP * LANES)
    inner = Loop(builder, I64(GROUP), outer.values)
    depth = builder.add(builder.mul(outer.index, I64(GROUP)), inner.index)
    offset = builder.mul(depth, I64(LANES))
    codes = [load_floats(builder, builder.add(base, offset), element) for base in w_panels]
    weights = [builder.fmul(one, factor) for one, factor in zip(codes, factors, strict=True)]
    sums = []
    for row in range(rows):
        address = builder.add(x_rows[row], builder.shl(depth, I64(2)))
        broadcast = splat(builder, load(builder, address, FLOAT, 4))
        totals = inner.values[row * panels : (row + 1) * panels]
        sums += [fma(builder, broadcast, weight, total) for weight, total in zip(weights, totals, strict=True)]
    sums = outer.close(inner.close(sums))
    write_sums(builder, sums, panels, out, ldo, adds)
    builder.ret_void()
    return function


_Element = TypeVar("_Element")  # of the weights: a name, or what says more
_Writer = Callable[[ir.Module, int, int, _Element], ir.Function]


def dispatching(
    write: _Writer[_Element],
    element: _Element,
    num_arguments: int,
    most: TileRows = FLOAT_TILES,
    *,
    min_rows: int = 1,
) -> Callable[..., None]:
    """An intrinsic (rows, panels, *arguments) that calls the tile of so many rows, `min_rows` or more, and panels.

    Few rows take two panels, for enough independent sums to hide the latency of an addition; more rows only where two
    panels of them fit into the registers.
    """

    @intrinsic
    def tile(typing_context, arguments):
        def generate(context, builder, signature, values):
            (packed,) = values
            rows, panels, *rest = cgutils.unpack_tuple(builder, packed, 2 + num_arguments)
            end = builder.append_basic_block("tiled")
            case = builder.add(builder.mul(rows, I64(2)), panels)
            switch = builder.switch(case, end)
            for num_panels, rows_of_tallest in ((1, most.one_panel), (2, most.two_panels)):
                for num_rows in range(min_rows, rows_of_tallest + 1):
                    block = builder.append_basic_block("tile")
                    switch.add_case(I64(2 * num_rows + num_panels), block)
                    builder.position_at_end(block)
                    builder.call(write(builder.module, num_rows, num_panels, element), rest)
                    builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(arguments), generate

    return tile


multiply_float32 = dispatching(_float_tile, "float32", 10)
multiply_bfloat16 = dispatching(_bfloat16_tile, "float32", 10)
multiply_rounded_bfloat16 = dispatching(_bfloat16_tile, "bfloat16", 10)
multiply_float16 = dispatching(_float_tile, "float16", 10)
multiply_float8 = dispatching(_float8_tile, "float8", 11)


@njit(inline="always")
def rows_of_next_tile(remaining, most):
    """Rows of the next of the tiles, of `most` rows or fewer, that `remaining` rows are divided into: all of about the
    same height."""
    return -(-remaining // -(-remaining // most))


@njit(inline="always")
def shape_of_next_tile(rows, panels, most):
    """(panels, the most rows) of the next tile of `rows` by `panels`: two panels, where there are two and the sums of
    the rows fit into registers. most: a TileRows"""
    if panels > 1 and (most.two_panels >= most.one_panel or rows <= most.two_panels):
        return 2, most.two_panels
    return 1, most.one_panel
