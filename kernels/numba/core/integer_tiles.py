"""Register tiles of integer weights: exact sums of products within what shares a scale, then float32 sums.

Rows are integers too: of 16 bits, two depths side by side in a panel, or of 8 bits, four depths.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial, reduce

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from kernels.numba.core.formats import GROUP, IntegerFormat
from kernels.numba.core.lanes import (
    FLOAT,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    Loop,
    call_by_name,
    define,
    fma,
    load,
    splat,
    store,
)
from kernels.numba.core.levels import WORDS, Scales, load_levels, load_scales, splat_word
from kernels.numba.core.processor import TileRows, features, level
from kernels.numba.core.tiles import dispatching, prefetch_span, write_sums

INTEGER_TILES = level().integers
UNPACKS = INTEGER_TILES.two_panels < INTEGER_TILES.one_panel  # whether tiles have no register to unpack levels
MAX_SUMS_WRITTEN_OUT = {8: 0 if UNPACKS else 8, 16: 0}  # of a tile, by bits of its levels; with fewer bits, any
MIN_ROWS_TO_UNPACK = 12  # with fewer, each tile unpacks a panel itself
UNPACKED_TILES = TileRows(0, 6 if UNPACKS else 0)
BYTE_TILES = TileRows(2, 6) if UNPACKS else INTEGER_TILES  # of pairs of levels of 8 bits, which need no unpacking


def _multiply_pairs(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Products of 32 int16, neighbours added: [16] int32 (x86: PMADDWD)."""
    width = 32 if "avx512bw" in features() else 16 if "avx2" in features() else 0
    if not width:
        wide = ir.VectorType(I32, 2 * LANES)
        products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
        even, odd = (
            builder.shuffle_vector(products, products, ir.Constant(INTS, list(range(first, 2 * LANES, 2))))
            for first in (0, 1)
        )
        return builder.add(even, odd)
    name = "llvm.x86.avx512.pmaddw.d.512" if width == 32 else "llvm.x86.avx2.pmadd.wd"
    part = ir.VectorType(I32, width // 2)
    if width == 32:
        return call_by_name(builder, name, part, a, b)
    halves = []
    for first in (0, 16):
        lanes = ir.Constant(ir.VectorType(I32, 16), list(range(first, first + 16)))
        halves.append(call_by_name(builder, name, part, *(builder.shuffle_vector(v, v, lanes) for v in (a, b))))
    return builder.shuffle_vector(halves[0], halves[1], ir.Constant(INTS, list(range(LANES))))


def add_pair_products(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """total + the products of 32 int16, neighbours added: [16] int32 (x86: VPDPWSSD, or what LLVM finds faster)."""
    if "avx512vnni" in features():
        words = (builder.bitcast(part, INTS) for part in (a, b))
        return call_by_name(builder, "llvm.x86.avx512.vpdpwssd.512", INTS, total, *words)
    return builder.add(total, _multiply_pairs(builder, a, b))


def _integer_tile(module: ir.Module, rows: int, panels: int, weights: IntegerFormat) -> ir.Function:
    """(x, ldx, factors, ldg, w, panel_stride, scales, scale_stride, num_groups, ahead, out, ldo, adds): exact sums of
    integer products within what shares a scale, then float32 sums of those, each times its two scales.

    x: int16 [rows, num_groups * GROUP], or uint8 for weights in quads; ldx: elements from row to row
    factors: [rows, ldg, 4] of 32 bits, as `round_groups` leaves them, or `round_groups_to_bytes`
    w, scales: of the first panel, as `formats.IntegerFormat` and `load_scales` have them; their strides: bytes from
    panel to panel; ahead: as of `_float_tile`; the scales of those panels are prefetched too
    """
    function, is_new = define(module, f"tile_{rows}x{panels}_{re.sub(r'[^A-Za-z0-9]', '_', weights.name)}", 13)
    if not is_new:
        return function
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    x, ldx, factors, ldg, w, panel_stride, scales, scale_stride, num_groups, ahead, out, ldo, adds = function.args
    x_bytes = 4 // weights.depths
    outer = Loop(builder, num_groups, [ir.Constant(FLOATS, [0.0] * LANES)] * (rows * panels))
    group = outer.index
    first_x = builder.add(x, builder.mul(group, I64(x_bytes * GROUP)))
    x_groups = [builder.add(first_x, builder.mul(ldx, I64(x_bytes * row))) for row in range(rows)]
    first_w = builder.add(w, builder.mul(group, I64(weights.group_bytes)))
    w_groups = [builder.add(first_w, builder.mul(panel_stride, I64(panel))) for panel in range(panels)]
    s_panels = [builder.add(scales, builder.mul(scale_stride, I64(panel))) for panel in range(panels)]
    if not weights.is_unpacked:
        prefetch_span(builder, w_groups, ahead, weights.group_bytes)
        spread = builder.mul(group, I64(weights.scale_bytes))
        distance = builder.add(builder.mul(scale_stride, I64(panels)), spread)
        prefetch_span(builder, s_panels, distance, weights.scale_bytes)
    of_rows = [
        builder.add(factors, builder.shl(builder.add(builder.mul(ldg, I64(row)), group), I64(4))) for row in range(rows)
    ]
    of_panels = [load_scales(builder, base, weights, group) for base in s_panels]
    sums = list(outer.values)
    for part in range(weights.num_sums):
        scale = part * weights.per_sum // weights.per_scale
        totals = _sums_of_part(builder, x_groups, w_groups, weights, part, of_rows)
        for row, address in enumerate(of_rows):
            row_scale = splat(builder, load(builder, address, FLOAT, 4))
            row_sum = _sum_of_row(builder, address, weights, part) if weights.has_offsets else None
            for panel in range(panels):
                index = row * panels + panel
                sums[index] = _add_part(
                    builder, sums[index], totals[index], of_panels[panel][scale], row_scale, row_sum
                )
    sums = outer.close(sums)
    write_sums(builder, sums, panels, out, ldo, adds)
    builder.ret_void()
    return function


def _add_part(
    builder: ir.IRBuilder,
    before: ir.Value,
    total: ir.Value,
    scales: Scales,
    row_scale: ir.Value,
    row_sum: ir.Value | None,
) -> ir.Value:
    """before + a sum of integer products, times the row's scale and the columns', and the columns' offsets times the
    row's sum where they have some."""
    value = fma(builder, total, builder.fmul(row_scale, scales.scale), before)
    return value if row_sum is None else fma(builder, row_sum, scales.offset, value)


def _sum_of_row(builder: ir.IRBuilder, factors: ir.Value, weights: IntegerFormat, part: int) -> ir.Value:
    """The sum of a row's elements, which meets the columns' offsets: of a group, whose factors are at this address, or
    of the part that has offsets of its own. [16] float32"""
    if weights.num_scales == 1:
        place = 4 if weights.depths == 2 else 8
        return splat(builder, load(builder, builder.add(factors, I64(place)), FLOAT, 4))
    scale, whole = load(builder, factors, FLOAT, 4), _integer_sum(builder, factors, weights, part)
    return splat(builder, builder.fmul(scale, builder.sitofp(whole, FLOAT)))


def _integer_sum(builder: ir.IRBuilder, factors: ir.Value, weights: IntegerFormat, part: int) -> ir.Value:
    """The sum of a row's integers, less the one that stands for zero, in a group or in the half with a scale of its
    own: int32."""
    size, first = (4, 8) if weights.depths == 2 else (2, 12)
    halves = (part,) if weights.num_scales > 1 else (0, 1)
    sums = [
        load(builder, builder.add(factors, I64(first + size * half)), I32 if size == 4 else I16, size)
        for half in halves
    ]
    wide = [one if size == 4 else builder.sext(one, I32) for one in sums]
    return reduce(builder.add, wide)


def _sums_of_part(
    builder: ir.IRBuilder,
    x_groups: list[ir.Value],
    w_groups: list[ir.Value],
    weights: IntegerFormat,
    part: int,
    of_rows: list[ir.Value],
) -> list[ir.Value]:
    """sum(x * (level - zero)) of one exact sum, part by part of a group, of each row and panel: [16] float32.

    It is sum(x * level) - zero * sum(x), with which a sum begins. In bytes, x is an integer less the one that stands
    for zero: that one times sum(level) is taken away too. sum(level) is taken here: it costs less than to read it.
    """
    starts = [ir.Constant(INTS, [0] * LANES)] * len(x_groups)
    if weights.zero:
        wholes = [_integer_sum(builder, address, weights, part) for address in of_rows]
        starts = [splat(builder, builder.mul(whole, I32(-weights.zero))) for whole in wholes]
    steps = range(part * weights.num_steps, (part + 1) * weights.num_steps)
    begin = [start for start in starts for _ in w_groups]
    if weights.depths == 2:
        totals = _pair_products(builder, x_groups, w_groups, weights, steps, begin)
        return [builder.sitofp(total, FLOATS) for total in totals]
    of_panels = [builder.sitofp(_weight_sums(builder, base, weights, steps), FLOATS) for base in w_groups]
    totals = _byte_products(builder, x_groups, w_groups, weights, steps, begin)
    zeros = [splat(builder, load(builder, builder.add(address, I64(4)), FLOAT, 4)) for address in of_rows]
    pairs = [(zero, of_panel) for zero in zeros for of_panel in of_panels]
    return [  # of whole numbers below 2^24
        fma(builder, *pair, builder.sitofp(total, FLOATS)) for pair, total in zip(pairs, totals, strict=True)
    ]


def _pair_products(
    builder: ir.IRBuilder,
    x_groups: list[ir.Value],
    w_groups: list[ir.Value],
    weights: IntegerFormat,
    steps: range,
    totals: list[ir.Value],
) -> list[ir.Value]:
    """The totals, and the products of these pairs of depths.

    Tiles of few rows are written out: what several pairs share is then loaded once. In those of many, LLVM would order
    it anew, and then has no registers for it.
    """
    if weights.bits < 8 or len(totals) <= MAX_SUMS_WRITTEN_OUT.get(weights.bits, 0):
        for step in steps:
            totals = _add_pair(builder, totals, x_groups, w_groups, weights, step)
        return totals
    loop = Loop(builder, I64(len(steps)), totals)
    step = builder.add(loop.index, I64(steps.start)) if steps.start else loop.index
    return loop.close(_add_pair(builder, loop.values, x_groups, w_groups, weights, step))


def _add_pair(
    builder: ir.IRBuilder,
    totals: list[ir.Value],
    x_groups: list[ir.Value],
    w_groups: list[ir.Value],
    weights: IntegerFormat,
    step: int | ir.Value,
) -> list[ir.Value]:
    """The totals, and the products of two depths."""
    levels = [load_levels(builder, base, weights, step) for base in w_groups]
    offset = I64(4 * step) if isinstance(step, int) else builder.shl(step, I64(2))
    sums = []
    for row, base in enumerate(x_groups):
        both = splat(builder, load(builder, builder.add(base, offset), I32, 2))
        broadcast = builder.bitcast(both, WORDS)
        own = totals[row * len(levels) : (row + 1) * len(levels)]
        sums += [add_pair_products(builder, total, broadcast, one) for total, one in zip(own, levels, strict=True)]
    return sums


_ONE_BYTES = ir.Constant(INTS, [0x01010101] * LANES)
_ONE_WORDS = ir.Constant(WORDS, [1] * (2 * LANES))


def _multiplies_bytes_in_pairs() -> bool:
    """Whether `_multiply_bytes` is an instruction, and there is none that does more."""
    return "avx2" in features() and "avx512vnni" not in features()


def _multiply_bytes(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Products of 64 bytes, those of a unsigned, neighbours added: [32] int16 (x86: PMADDUBSW), which must not be below
    -2^15 or above 2^15 - 1. With int4 they are not, and eight of them add up to 8 * 2 * 255 * 15, less than 2^16."""
    a, b = (builder.bitcast(part, ir.VectorType(I8, 4 * LANES)) for part in (a, b))
    if "avx512bw" in features():
        return call_by_name(builder, "llvm.x86.avx512.pmaddubs.w.512", ir.VectorType(I16, 2 * LANES), a, b)
    parts = []
    for first in (0, 32):
        lanes = ir.Constant(ir.VectorType(I32, 32), list(range(first, first + 32)))
        halves = (builder.shuffle_vector(part, part, lanes) for part in (a, b))
        parts.append(call_by_name(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, LANES), *halves))
    return builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, 32), list(range(32))))


def _byte_parts(builder: ir.IRBuilder, quads: ir.Value, *, signed: bool) -> list[ir.Value]:
    """16 quads of bytes as `_add_byte_products` takes them: as they are, or as 16-bit integers, every other byte."""
    if "avx512vnni" in features():
        return [quads]
    kind = ir.VectorType(I16, 2 * LANES)
    words, eight = builder.bitcast(quads, kind), ir.Constant(kind, [8] * (2 * LANES))
    if signed:
        return [builder.ashr(builder.shl(words, eight), eight), builder.ashr(words, eight)]
    return [builder.and_(words, ir.Constant(kind, [0xFF] * (2 * LANES))), builder.lshr(words, eight)]


def _add_byte_products(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """total + the products of a part of a and b, unsigned and signed, of each quad together: [16] int32 (VPDPBUSD)."""
    if "avx512vnni" in features():
        return call_by_name(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, total, a, b)
    return builder.add(total, _multiply_pairs(builder, a, b))


def add_quad_products(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """total + the products of a and b, unsigned and signed, of each quad together: [16] int32."""
    parts = _byte_parts(builder, a, signed=False), _byte_parts(builder, b, signed=True)
    for both in zip(*parts, strict=True):
        total = _add_byte_products(builder, total, *both)
    return total


def _byte_products(
    builder: ir.IRBuilder,
    x_groups: list[ir.Value],
    w_groups: list[ir.Value],
    weights: IntegerFormat,
    steps: range,
    totals: list[ir.Value],
) -> list[ir.Value]:
    """The totals, and the products of these quads of depths."""
    if not weights.is_signed and _multiplies_bytes_in_pairs():
        at_once = min(len(steps), 0xFFFF // (2 * 255 * weights.largest))  # in 16 bits, unsigned
        for first in range(steps.start, steps.stop, at_once):
            some = range(first, first + at_once)
            narrow = _narrow_products(builder, x_groups, w_groups, weights, some)
            totals = [
                builder.add(total, _add_neighbours(builder, one)) for total, one in zip(totals, narrow, strict=True)
            ]
        return totals
    for part in range(len(_byte_parts(builder, _ONE_BYTES, signed=False))):
        for step in steps:
            x_quads = [splat_word(builder, builder.add(base, I64(4 * step))) for base in x_groups]
            x_quads = [_byte_parts(builder, x, signed=False)[part] for x in x_quads]
            levels = [load_levels(builder, base, weights, step) for base in w_groups]
            levels = [_byte_parts(builder, one, signed=True)[part] for one in levels]
            pairs = zip(totals, [(x, one) for x in x_quads for one in levels], strict=True)
            totals = [_add_byte_products(builder, total, *pair) for total, pair in pairs]
    return totals


def _narrow_products(
    builder: ir.IRBuilder, x_groups: list[ir.Value], w_groups: list[ir.Value], weights: IntegerFormat, steps: range
) -> list[ir.Value]:
    """The products of these quads, in unsigned 16-bit integers, of two depths each: [32] int16."""
    totals = [ir.Constant(WORDS, None)] * (len(x_groups) * len(w_groups))
    for step in steps:
        x_quads = [splat_word(builder, builder.add(base, I64(4 * step))) for base in x_groups]
        levels = [load_levels(builder, base, weights, step) for base in w_groups]
        products = [_multiply_bytes(builder, x, one) for x in x_quads for one in levels]
        totals = [builder.add(total, one) for total, one in zip(totals, products, strict=True)]
    return totals


def _add_neighbours(builder: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """The sums of two unsigned 16-bit integers each: [32] int16 -> [16] int32."""
    both = builder.bitcast(words, INTS)
    low = builder.and_(both, ir.Constant(INTS, [0xFFFF] * LANES))
    return builder.add(low, builder.lshr(both, ir.Constant(INTS, [16] * LANES)))


def _weight_sums(builder: ir.IRBuilder, address: ir.Value, weights: IntegerFormat, steps: range) -> ir.Value:
    """Of these quads of a panel's group, at this address: sum(level), as [16] int32. By itself, since no register is
    free beside the sums of many rows.
    """
    quads = [load_levels(builder, address, weights, step) for step in steps]
    total = ir.Constant(INTS, [0] * LANES)
    if not weights.is_signed and weights.largest * len(steps) <= 0xFF:
        return add_quad_products(builder, total, reduce(partial(_add_bytes, builder), quads), _ONE_BYTES)
    if _multiplies_bytes_in_pairs():
        words = [_multiply_bytes(builder, _ONE_BYTES, quad) for quad in quads]
        return _multiply_pairs(builder, reduce(builder.add, words), _ONE_WORDS)
    for quad in quads:
        total = add_quad_products(builder, total, _ONE_BYTES, quad)
    return total


def _add_bytes(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The sums of 64 bytes, in [16] int32."""
    a, b = (builder.bitcast(part, ir.VectorType(I8, 4 * LANES)) for part in (a, b))
    return builder.bitcast(builder.add(a, b), INTS)


def multiply_integers(weights: IntegerFormat) -> Callable[..., None]:
    """An intrinsic (rows, panels, *arguments of a tile) for products with such weights."""
    return dispatching(_integer_tile, weights, 13, tiles_of(weights))


def tiles_of(weights: IntegerFormat) -> TileRows:
    """The shapes of the tiles that multiply such weights as they are packed."""
    return BYTE_TILES if weights.bits == 8 and weights.depths == 2 else INTEGER_TILES


def must_unpack(weights: IntegerFormat) -> bool:
    """Whether many rows are multiplied by what `unpack_levels` makes of such weights."""
    return UNPACKS and weights.bits < 8 and weights.depths == 2


def multiply_unpacked(weights: IntegerFormat) -> Callable[..., None]:
    """The same with what `unpack_levels` makes of them."""
    return dispatching(_integer_tile, weights.unpacked, 13, UNPACKED_TILES, min_rows=4)


def unpack_levels(weights: IntegerFormat) -> Callable[..., None]:
    """An intrinsic (w, out, num_groups) of addresses: the levels of a panel's groups as they are multiplied."""

    @intrinsic
    def unpack(typing_context, packed, out, num_groups):
        def generate(context, builder, signature, arguments):
            loop = Loop(builder, arguments[2], [])
            source = builder.add(arguments[0], builder.mul(loop.index, I64(weights.group_bytes)))
            target = builder.add(arguments[1], builder.mul(loop.index, I64(weights.unpacked.group_bytes)))
            for step in range(GROUP // weights.depths):
                levels = load_levels(builder, source, weights, step)
                store(builder, levels, builder.add(target, I64(4 * LANES * step)), 2)
            loop.close([])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return unpack
