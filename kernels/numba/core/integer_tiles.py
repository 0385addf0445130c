"""Register tiles of integer weights: exact sums of products within a group that shares a scale, then float32 sums.

Rows are integers too: of 16 bits, two depths side by side in a panel, or of 8 bits, four depths.
"""

from __future__ import annotations

from functools import partial, reduce

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from kernels.numba.core.lanes import (
    FLOAT,
    FLOATS,
    GROUP,
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
    load_floats,
    splat,
    store,
)
from kernels.numba.core.processor import TileRows, features, level
from kernels.numba.core.tiles import dispatching, prefetch_span, write_sums

INTEGER_TILES = level().integers
MAX_SUMS_WRITTEN_OUT = {"int4": 12, "int8": 8, "unpacked int4": 0}  # of a tile
UNPACKS = INTEGER_TILES.two_panels < INTEGER_TILES.one_panel  # whether tiles of int4 have no register to unpack
MIN_ROWS_TO_UNPACK = 12  # with fewer, each tile unpacks a panel itself
UNPACKED_TILES = TileRows(0, 6 if UNPACKS else 0)


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


def _load_pairs(builder: ir.IRBuilder, base: ir.Value, element: str, pair: ir.Value) -> ir.Value:
    """The integers of two depths in 16 columns, [32] int16: columns in order, the two depths side by side.

    base: the address of a group; pair: its index in the group. Four pairs of int4 are in one vector.
    """
    words = ir.VectorType(I16, 2 * LANES)
    if element == "unpacked int4":
        return load(builder, builder.add(base, builder.mul(pair, I64(4 * LANES))), words, 2)
    if element == "int8":
        address = builder.add(base, builder.mul(pair, I64(2 * LANES)))
        return builder.sext(load(builder, address, ir.VectorType(I8, 2 * LANES), 1), words)
    address = builder.add(base, builder.mul(builder.lshr(pair, I64(2)), I64(4 * LANES)))
    four = load(builder, address, INTS, 1)
    shift = builder.trunc(builder.mul(builder.and_(pair, I64(3)), I64(4)), I32)
    both = builder.and_(builder.lshr(four, splat(builder, shift)), ir.Constant(INTS, [0x000F000F] * LANES))
    return builder.bitcast(both, words)


def _integer_tile(module: ir.Module, rows: int, panels: int, element: str) -> ir.Function:
    """(x, ldx, x_scales, ldg, w, panel_stride, scales, panel_groups, num_groups, ahead, out, ldo, adds): exact sums of
    integer products within a group of `GROUP` elements, then float32 sums of the groups, each times its two scales.

    x: int16 [rows, num_groups * GROUP]; x_scales: float32 [rows, ldg, 2], the scale of each group and scale * sum
    w: each panel is int8 [num_groups, GROUP / 2, 16, 2], or int32 [num_groups, GROUP / 8, 16] with eight int4, those of
    depths 2i and 2i + 1 from bits 4i and 16 + 4i on, or the same as int16 [num_groups, GROUP / 2, 16, 2]
    scales: float16, each panel is [panel_groups, 16] (int8), or [panel_groups, 2, 16] with the offset too (int4)
    panel_stride: bytes of a panel of w; ahead: as of `_float_tile`; the scales of those panels are prefetched too
    """
    function, is_new = define(module, f"integer_tile_{rows}x{panels}_{element.replace(' ', '_')}", 13)
    if not is_new:
        return function
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    x, ldx, x_scales, ldg, w, panel_stride, scales, panel_groups, num_groups, ahead, out, ldo, adds = function.args
    has_offset = element != "int8"
    pair_bytes = {"int4": LANES, "int8": 2 * LANES, "unpacked int4": 4 * LANES}[element]
    group_scales = 2 * LANES * (2 if has_offset else 1)  # bytes
    zero = ir.Constant(FLOATS, [0.0] * LANES)
    outer = Loop(builder, num_groups, [zero] * (rows * panels))
    group = outer.index
    first_x = builder.mul(group, I64(2 * GROUP))
    x_groups = [builder.add(builder.add(x, builder.mul(ldx, I64(2 * row))), first_x) for row in range(rows)]
    first_pair = builder.mul(group, I64(pair_bytes * (GROUP // 2)))
    w_groups = [builder.add(builder.add(w, builder.mul(panel_stride, I64(p))), first_pair) for p in range(panels)]
    scale_stride, first_scale = builder.mul(panel_groups, I64(group_scales)), builder.mul(group, I64(group_scales))
    s_groups = [builder.add(builder.add(scales, builder.mul(scale_stride, I64(p))), first_scale) for p in range(panels)]
    if element != "unpacked int4":
        prefetch_span(builder, w_groups, ahead, pair_bytes * (GROUP // 2))
        prefetch_span(builder, s_groups, builder.mul(scale_stride, I64(panels)), group_scales)
    totals = _pair_products(builder, x_groups, w_groups, element)
    sums = []
    for row in range(rows):
        scale_offset = builder.add(builder.mul(ldg, I64(8 * row)), builder.mul(group, I64(8)))
        row_scale = splat(builder, load(builder, builder.add(x_scales, scale_offset), FLOAT, 4))
        row_sum = splat(builder, load(builder, builder.add(x_scales, builder.add(scale_offset, I64(4))), FLOAT, 4))
        for panel in range(panels):
            total = builder.sitofp(totals[row * panels + panel], FLOATS)
            before, offset_by = outer.values[row * panels + panel], row_sum if has_offset else None
            sums.append(_add_group(builder, before, total, s_groups[panel], row_scale, offset_by))
    sums = outer.close(sums)
    write_sums(builder, sums, panels, out, ldo, adds)
    builder.ret_void()
    return function


def _pair_products(
    builder: ir.IRBuilder, x_groups: list[ir.Value], w_groups: list[ir.Value], element: str
) -> list[ir.Value]:
    """Of a group, at these addresses: sum(x * w) of each row and panel, as [16] int32.

    Tiles of few rows are written out: what four pairs of int4 share is then loaded once. In those of many, LLVM would
    order it anew, and then has no registers for it.
    """
    zeros = [ir.Constant(INTS, [0] * LANES)] * (len(x_groups) * len(w_groups))
    if len(zeros) <= MAX_SUMS_WRITTEN_OUT[element]:
        totals = zeros
        for pair in range(GROUP // 2):
            totals = _add_pair(builder, totals, x_groups, w_groups, element, I64(pair))
        return totals
    loop = Loop(builder, I64(GROUP // 2), zeros)
    return loop.close(_add_pair(builder, loop.values, x_groups, w_groups, element, loop.index))


def _add_pair(
    builder: ir.IRBuilder,
    totals: list[ir.Value],
    x_groups: list[ir.Value],
    w_groups: list[ir.Value],
    element: str,
    pair: ir.Value,
) -> list[ir.Value]:
    """The totals, and the products of two depths."""
    weights = [_load_pairs(builder, base, element, pair) for base in w_groups]
    offset = builder.shl(pair, I64(2))
    sums = []
    for row, base in enumerate(x_groups):
        both = splat(builder, load(builder, builder.add(base, offset), I32, 2))
        broadcast = builder.bitcast(both, ir.VectorType(I16, 2 * LANES))
        own = totals[row * len(weights) : (row + 1) * len(weights)]
        sums += [add_pair_products(builder, total, broadcast, one) for total, one in zip(own, weights, strict=True)]
    return sums


def _add_group(
    builder: ir.IRBuilder,
    before: ir.Value,
    total: ir.Value,
    scales: ir.Value,
    scale: ir.Value,
    row_sum: ir.Value | None,
) -> ir.Value:
    """before + a group's sum of integer products, times the row's scale and the columns', and the columns' offsets
    times the row's sum where they have some. scales: the address of the columns'"""
    scale = builder.fmul(scale, load_floats(builder, scales, "float16"))
    value = fma(builder, total, scale, before)
    if row_sum is None:
        return value
    return fma(builder, row_sum, load_floats(builder, builder.add(scales, I64(2 * LANES)), "float16"), value)


_ONE_BYTES = ir.Constant(INTS, [0x01010101] * LANES)
_ONE_WORDS = ir.Constant(ir.VectorType(I16, 2 * LANES), [1] * (2 * LANES))


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


def _load_quad(builder: ir.IRBuilder, address: ir.Value, element: str, quad: ir.Value) -> ir.Value:
    """The integers of four depths in 16 columns, the depths side by side, as [16] int32; quad: the index of the four in
    a group. Two quads of int4 are in one."""
    if element == "int8":
        return load(builder, builder.add(address, builder.mul(quad, I64(4 * LANES))), INTS, 1)
    both = load(builder, builder.add(address, builder.mul(builder.lshr(quad, I64(1)), I64(4 * LANES))), INTS, 1)
    shift = builder.trunc(builder.mul(builder.and_(quad, I64(1)), I64(4)), I32)
    return builder.and_(builder.lshr(both, splat(builder, shift)), ir.Constant(INTS, [0x0F0F0F0F] * LANES))


def _byte_tile(module: ir.Module, rows: int, panels: int, element: str) -> ir.Function:
    """The arguments, and the sums, of `_integer_tile`, for rows of unsigned 8-bit integers, one of which is zero.

    x: uint8 [rows, num_groups * GROUP]; x_scales: float32 [rows, ldg, 4], as `round_groups_to_bytes` leaves them
    w: each panel is int8 [num_groups, GROUP / 4, 16, 4], or uint8 [num_groups, GROUP / 8, 16, 4] with two int4, the
    upper one of four depths further on

    sum((x - zero) * w) is sum(x * w) - zero * sum(w), and sum(w) is taken here: it costs less than to read it.
    """
    function, is_new = define(module, f"byte_tile_{rows}x{panels}_{element}", 13)
    if not is_new:
        return function
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    x, ldx, x_scales, ldg, w, panel_stride, scales, panel_groups, num_groups, ahead, out, ldo, adds = function.args
    has_offset = element == "int4"
    group_bytes = GROUP * LANES // (2 if has_offset else 1)
    group_scales = 2 * LANES * (2 if has_offset else 1)  # bytes
    zero = ir.Constant(FLOATS, [0.0] * LANES)
    outer = Loop(builder, num_groups, [zero] * (rows * panels))
    group = outer.index
    first_x = builder.add(x, builder.mul(group, I64(GROUP)))
    x_groups = [builder.add(first_x, builder.mul(ldx, I64(row))) for row in range(rows)]
    first_w, first_scale = builder.mul(group, I64(group_bytes)), builder.mul(group, I64(group_scales))
    w_groups = [builder.add(builder.add(w, builder.mul(panel_stride, I64(p))), first_w) for p in range(panels)]
    scale_stride = builder.mul(panel_groups, I64(group_scales))
    s_groups = [builder.add(builder.add(scales, builder.mul(scale_stride, I64(p))), first_scale) for p in range(panels)]
    prefetch_span(builder, w_groups, ahead, group_bytes)
    prefetch_span(builder, s_groups, builder.mul(scale_stride, I64(panels)), group_scales)
    weight_sums = [builder.sitofp(_weight_sums(builder, base, element), FLOATS) for base in w_groups]
    totals = _byte_products(builder, x_groups, w_groups, element)
    sums = []
    for row in range(rows):
        factors = builder.add(x_scales, builder.shl(builder.add(builder.mul(ldg, I64(row)), group), I64(4)))
        row_scale, row_zero, row_sum = (
            splat(builder, load(builder, builder.add(factors, I64(4 * place)), FLOAT, 4)) for place in range(3)
        )
        for panel in range(panels):
            total = builder.sitofp(totals[row * panels + panel], FLOATS)
            total = fma(builder, row_zero, weight_sums[panel], total)  # whole numbers below 2^24
            before, offset_by = outer.values[row * panels + panel], row_sum if has_offset else None
            sums.append(_add_group(builder, before, total, s_groups[panel], row_scale, offset_by))
    sums = outer.close(sums)
    write_sums(builder, sums, panels, out, ldo, adds)
    builder.ret_void()
    return function


def _byte_products(
    builder: ir.IRBuilder, x_groups: list[ir.Value], w_groups: list[ir.Value], element: str
) -> list[ir.Value]:
    """Of a group, at these addresses: sum(x * w) of each row and panel, as [16] int32.

    A loop has one quad at a time, and one of its parts: LLVM orders what is in one step anew, and then has no registers
    for it.
    """
    is_narrow = element == "int4" and _multiplies_bytes_in_pairs()
    totals = [ir.Constant(_ONE_WORDS.type if is_narrow else INTS, None)] * (len(x_groups) * len(w_groups))
    for part in range(1 if is_narrow else len(_byte_parts(builder, _ONE_BYTES, signed=False))):
        loop = Loop(builder, I64(GROUP // 4), totals)
        offset = builder.mul(loop.index, I64(4))
        x_quads = [splat(builder, load(builder, builder.add(base, offset), I32, 1)) for base in x_groups]
        weights = [_load_quad(builder, base, element, loop.index) for base in w_groups]
        if is_narrow:
            products = [_multiply_bytes(builder, x, weight) for x in x_quads for weight in weights]
            totals = [builder.add(total, one) for total, one in zip(loop.values, products, strict=True)]
        else:
            weights = [_byte_parts(builder, weight, signed=True)[part] for weight in weights]
            x_quads = [_byte_parts(builder, x, signed=False)[part] for x in x_quads]
            pairs = zip(loop.values, [(x, weight) for x in x_quads for weight in weights], strict=True)
            totals = [_add_byte_products(builder, total, *pair) for total, pair in pairs]
        totals = loop.close(totals)
    return [_add_neighbours(builder, total) for total in totals] if is_narrow else totals


def _add_neighbours(builder: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """The sums of two unsigned 16-bit integers each: [32] int16 -> [16] int32."""
    both = builder.bitcast(words, INTS)
    low = builder.and_(both, ir.Constant(INTS, [0xFFFF] * LANES))
    return builder.add(low, builder.lshr(both, ir.Constant(INTS, [16] * LANES)))


def _weight_sums(builder: ir.IRBuilder, address: ir.Value, element: str) -> ir.Value:
    """Of a group of a panel, at this address: sum(w), as [16] int32. By itself, since no register is free beside the
    sums of many rows.
    """
    quads = [_load_quad(builder, address, element, I64(quad)) for quad in range(GROUP // 4)]
    if element == "int4":  # 8 * 15 at most, in a byte
        quads = [reduce(partial(_add_bytes, builder), quads)]
    elif _multiplies_bytes_in_pairs():
        words = [_multiply_bytes(builder, _ONE_BYTES, quad) for quad in quads]
        return _multiply_pairs(builder, reduce(builder.add, words), _ONE_WORDS)
    total = ir.Constant(INTS, [0] * LANES)
    for quad in quads:
        total = add_quad_products(builder, total, _ONE_BYTES, quad)
    return total


def _add_bytes(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The sums of 64 bytes, in [16] int32."""
    a, b = (builder.bitcast(part, ir.VectorType(I8, 4 * LANES)) for part in (a, b))
    return builder.bitcast(builder.add(a, b), INTS)


multiply_int8 = dispatching(_integer_tile, "int8", 13, INTEGER_TILES)
multiply_int4 = dispatching(_integer_tile, "int4", 13, INTEGER_TILES)
multiply_unpacked_int4 = dispatching(_integer_tile, "unpacked int4", 13, UNPACKED_TILES, min_rows=4)
multiply_quad_int8 = dispatching(_byte_tile, "int8", 13, INTEGER_TILES)
multiply_quad_int4 = dispatching(_byte_tile, "int4", 13, INTEGER_TILES)


@intrinsic
def unpack_int4(typing_context, packed, out, num_groups):
    """int32 [num_groups, GROUP / 8, 16] with eight int4 each -> int16 [num_groups, GROUP / 2, 16, 2], addresses."""

    def generate(context, builder, signature, arguments):
        loop = Loop(builder, arguments[2], [])
        source = builder.add(arguments[0], builder.mul(loop.index, I64(GROUP * LANES // 2)))
        target = builder.add(arguments[1], builder.mul(loop.index, I64(2 * GROUP * LANES)))
        for pair in range(GROUP // 2):
            both = _load_pairs(builder, source, "int4", I64(pair))
            store(builder, both, builder.add(target, I64(4 * LANES * pair)), 2)
        loop.close([])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate
