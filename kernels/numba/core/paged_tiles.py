"""Register tiles of a paged cache: a few rows times keys, or times values, whose parts lie anywhere in memory.

A part is 16 tokens of a block. Tiles of several parts, or of several times 16 columns of the values, have more
independent sums, which hide the latency of an addition where rows are few. Sums are ordered as those of other tiles.
"""

from __future__ import annotations

from llvmlite import ir

from kernels.numba.core.lanes import FLOAT, FLOATS, I64, LANES, Loop, define, fma, load, load_floats, splat
from kernels.numba.core.processor import LINE
from kernels.numba.core.tiles import dispatching, prefetch, write_sums

PARTS_AHEAD = 2  # parts that are prefetched, 1 to 4 KB each, since the hardware's prefetcher cannot predict them


def _score_tile(module: ir.Module, rows: int, panels: int, element: str) -> ir.Function:
    """(x, ldx, parts, w_stride, depth, num_parts, out, ldo): each part is 16 columns of out = x @ part.

    x: float32 [rows, depth]; parts: addresses of num_parts, a multiple of `panels`, and of the next PARTS_AHEAD
    element i of column c of a part is i * w_stride + c
    """
    function, is_new = define(module, f"score_tile_{rows}x{panels}_{element}", 8)
    if not is_new:
        return function
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    x, ldx, parts, w_stride, depth, num_parts, out, ldo = function.args
    step = builder.mul(w_stride, I64(_size(element)))
    x_rows = [builder.add(x, builder.mul(ldx, I64(4 * row))) for row in range(rows)]
    outer = Loop(builder, builder.sdiv(num_parts, I64(panels)), [])
    first = builder.mul(outer.index, I64(panels))
    here, following = (
        [_part(builder, parts, builder.add(first, I64(ahead + part))) for part in range(panels)]
        for ahead in (0, PARTS_AHEAD)
    )
    inner = Loop(builder, depth, [ir.Constant(FLOATS, [0.0] * LANES)] * (rows * panels))
    distance = builder.mul(inner.index, step)
    for address in following:
        prefetch(builder, builder.add(address, distance))
    weights = [load_floats(builder, builder.add(part, distance), element) for part in here]
    sums = inner.close(_add_products(builder, inner.values, x_rows, inner.index, weights))
    write_sums(builder, sums, panels, builder.add(out, builder.mul(first, I64(4 * LANES))), ldo, I64(0))
    outer.close([])
    builder.ret_void()
    return function


def _value_tile(module: ir.Module, rows: int, panels: int, element: str) -> ir.Function:
    """(x, ldx, parts, offset, w_stride, skipped, depth, out, ldo): each part is 16 elements of the depth, and out += x
    @ parts, `panels` times 16 columns.

    x: float32 [rows, depth], of which the first `skipped`, fewer than 16, are left out; parts: as of `_score_tile`
    element i of column c of a part is i * w_stride + c after `offset` bytes
    """
    function, is_new = define(module, f"value_tile_{rows}x{panels}_{element}", 9)
    if not is_new:
        return function
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    x, ldx, parts, offset, w_stride, skipped, depth, out, ldo = function.args
    size = _size(element)
    step = builder.mul(w_stride, I64(size))
    num_parts = builder.sdiv(builder.add(depth, I64(LANES - 1)), I64(LANES))
    outer = Loop(builder, num_parts, [ir.Constant(FLOATS, [0.0] * LANES)] * (rows * panels))
    part, following = (
        builder.add(_part(builder, parts, builder.add(outer.index, I64(ahead))), offset) for ahead in (0, PARTS_AHEAD)
    )
    first = builder.mul(outer.index, I64(LANES))
    begin = builder.select(builder.icmp_signed("==", outer.index, I64(0)), skipped, I64(0))
    left = builder.sub(depth, first)
    end = builder.select(builder.icmp_signed("<", left, I64(LANES)), left, I64(LANES))
    x_rows = [
        builder.add(x, builder.shl(builder.add(builder.mul(ldx, I64(row)), first), I64(2))) for row in range(rows)
    ]
    inner = Loop(builder, builder.sub(end, begin), outer.values)
    index = builder.add(inner.index, begin)
    distance = builder.mul(index, step)
    for line in range(0, panels * LANES * size, LINE):
        prefetch(builder, builder.add(following, builder.add(distance, I64(line))))
    first_column = builder.add(part, distance)
    weights = [
        load_floats(builder, builder.add(first_column, I64(size * LANES * panel)), element) for panel in range(panels)
    ]
    sums = outer.close(inner.close(_add_products(builder, inner.values, x_rows, index, weights)))
    write_sums(builder, sums, panels, out, ldo, I64(1))
    builder.ret_void()
    return function


def _size(element: str) -> int:
    """Bytes."""
    return {"float32": 4, "int8": 1}.get(element, 2)


def _part(builder: ir.IRBuilder, parts: ir.Value, index: ir.Value) -> ir.Value:
    """The address of a part."""
    return load(builder, builder.add(parts, builder.shl(index, I64(3))), I64, 8)


def _add_products(
    builder: ir.IRBuilder, totals: list[ir.Value], x_rows: list[ir.Value], index: ir.Value, weights: list[ir.Value]
) -> list[ir.Value]:
    """The totals of each row and panel, and one element of each row times the panels' weights."""
    sums = []
    for row, base in enumerate(x_rows):
        scalar = splat(builder, load(builder, builder.add(base, builder.shl(index, I64(2))), FLOAT, 4))
        own = totals[row * len(weights) : (row + 1) * len(weights)]
        sums += [fma(builder, scalar, weight, total) for weight, total in zip(weights, own, strict=True)]
    return sums


score_float32, score_bfloat16, score_float16, score_int8 = (
    dispatching(_score_tile, element, 8) for element in ("float32", "bfloat16", "float16", "int8")
)
weigh_float32, weigh_bfloat16, weigh_float16, weigh_int8 = (
    dispatching(_value_tile, element, 9) for element in ("float32", "bfloat16", "float16", "int8")
)
