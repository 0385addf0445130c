"""Matrix products with packed weights. A unit of work, done by one thread, is a block of rows by some panels."""

from __future__ import annotations

from numba import njit, types

from kernels.numba.core.formats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT4,
    INT8,
    QUAD_INT4,
    QUAD_INT8,
    ROUNDED_BFLOAT16,
)
from kernels.numba.core.integer_tiles import (
    INTEGER_TILES,
    MIN_ROWS_TO_UNPACK,
    UNPACKED_TILES,
    UNPACKS,
    multiply_int4,
    multiply_int8,
    multiply_quad_int4,
    multiply_quad_int8,
    multiply_unpacked_int4,
    unpack_int4,
)
from kernels.numba.core.lanes import GROUP, LANES
from kernels.numba.core.tiles import (
    FLOAT_TILES,
    multiply_bfloat16,
    multiply_float16,
    multiply_float32,
    multiply_rounded_bfloat16,
    rows_of_next_tile,
    shape_of_next_tile,
)
from kernels.numba.kernel_cache import by_name, kernel

BLOCK_ROWS = 96  # rows that stay in the L2 cache while they are multiplied by one panel after the other
BLOCK_DEPTH = 1024  # elements of the depth that are summed in registers at once; a multiple of GROUP
SCRATCH_BYTES = BLOCK_DEPTH * LANES * 2  # of a thread: a panel of int4 that is unpacked once for all tiles


@njit
def panel_bytes(kind, depth):
    """Bytes of the elements of one panel. depth: a multiple of GROUP for the integer formats"""
    if kind == FLOAT32:
        return depth * LANES * 4
    if kind in (INT8, QUAD_INT8):
        return depth * LANES
    if kind in (INT4, QUAD_INT4):
        return depth * LANES // 2
    return depth * LANES * 2


@njit
def _row_bytes(kind, depth):
    """Bytes of a row that such a matrix is multiplied by."""
    if kind in (QUAD_INT8, QUAD_INT4):
        return depth
    return depth * (2 if kind in (INT8, INT4, ROUNDED_BFLOAT16) else 4)


@njit
def _factor_bytes(kind, depth):
    """Bytes of the factors of the row's groups."""
    return depth // GROUP * (16 if kind in (QUAD_INT8, QUAD_INT4) else 8)


@njit(inline="always")  # as the next one: tiles are compiled where they are called
def _multiply(kind, rows, panels, x, scales, depth, w, w_scales, first, count, unpacked, out, ldo, adds):
    """One tile over elements first..first + count of the depth; addresses are of the tile's first row and panel.

    unpacked: those elements of an int4 panel as int16, or 0
    """
    stride = panel_bytes(kind, depth)
    skipped = panel_bytes(kind, first)
    ahead = panels * stride  # the panels of the next tile
    if kind == FLOAT32:
        multiply_float32(
            (rows, panels, x + first * 4, depth, w + skipped, LANES, stride // 4, count, ahead, out, ldo, adds)
        )
    elif kind == BFLOAT16:
        multiply_bfloat16(
            (rows, panels, x + first * 4, depth, w + skipped, LANES, stride // 2, count, ahead, out, ldo, adds)
        )
    elif kind == ROUNDED_BFLOAT16:
        multiply_rounded_bfloat16(
            (rows, panels, x + first * 2, depth, w + skipped, LANES, stride // 2, count, ahead, out, ldo, adds)
        )
    elif kind == FLOAT16:
        multiply_float16(
            (rows, panels, x + first * 4, depth, w + skipped, LANES, stride // 2, count, ahead, out, ldo, adds)
        )
    else:
        groups, group = depth // GROUP, first // GROUP
        x_scales = scales + _factor_bytes(kind, first)
        if unpacked != 0:
            multiply_unpacked_int4(
                (rows, panels, x + first * 2, depth, x_scales, groups, unpacked, 0,
                 w_scales + group * LANES * 4, groups, count // GROUP, ahead, out, ldo, adds)
            )  # fmt: skip
        elif kind == INT8:
            multiply_int8(
                (rows, panels, x + first * 2, depth, x_scales, groups, w + skipped, stride,
                 w_scales + group * LANES * 2, groups, count // GROUP, ahead, out, ldo, adds)
            )  # fmt: skip
        elif kind == QUAD_INT8:
            multiply_quad_int8(
                (rows, panels, x + first, depth, x_scales, groups, w + skipped, stride,
                 w_scales + group * LANES * 2, groups, count // GROUP, ahead, out, ldo, adds)
            )  # fmt: skip
        elif kind == QUAD_INT4:
            multiply_quad_int4(
                (rows, panels, x + first, depth, x_scales, groups, w + skipped, stride,
                 w_scales + group * LANES * 4, groups, count // GROUP, ahead, out, ldo, adds)
            )  # fmt: skip
        else:
            multiply_int4(
                (rows, panels, x + first * 2, depth, x_scales, groups, w + skipped, stride,
                 w_scales + group * LANES * 4, groups, count // GROUP, ahead, out, ldo, adds)
            )  # fmt: skip


@njit(inline="always")
def _multiply_panels(
    kind, rows, x, scales, depth, w, w_scales, start, first_panel, last_panel, out, ldo, adds, scratch
):
    count = min(BLOCK_DEPTH, depth - start)
    row_bytes, factor_bytes = _row_bytes(kind, depth), _factor_bytes(kind, depth)
    panel_scales = depth // GROUP * LANES * (4 if kind in (INT4, QUAD_INT4) else 2)
    tallest = INTEGER_TILES if kind in (INT8, INT4, QUAD_INT8, QUAD_INT4) else FLOAT_TILES
    panel = first_panel
    while panel < last_panel:
        panels, most = shape_of_next_tile(rows, last_panel - panel, tallest)
        unpacked = 0
        if UNPACKS and kind == INT4 and rows >= MIN_ROWS_TO_UNPACK:
            unpacked, most = scratch, UNPACKED_TILES.one_panel
            unpack_int4(w + panel * panel_bytes(kind, depth) + panel_bytes(kind, start), scratch, count // GROUP)
        row = 0
        while row < rows:
            tile = rows_of_next_tile(rows - row, most)
            _multiply(
                kind, tile, panels, x + row * row_bytes, scales + row * factor_bytes, depth,
                w + panel * panel_bytes(kind, depth), w_scales + panel * panel_scales, start, count, unpacked,
                out + (row * ldo + panel * LANES) * 4, ldo, adds,
            )  # fmt: skip
            row += tile
        panel += panels


@kernel(types.void(*[types.int64] * 14))
def _multiply_unit(
    unit, kind, x, scales, rows, depth, w, w_scales, num_panels, panels_at_once, out, ldo, adds, scratch
):
    """One unit of out (+)= x @ w.T; there are ceil(num_panels / panels_at_once) for each BLOCK_ROWS rows.

    x: float32 [rows, depth], or for ROUNDED_BFLOAT16 bfloat16, or for integers int16 with scales as `quantise_rows`
    leaves them, or for those in quads uint8 as `quantise_rows_to_bytes` does; out: float32, ldo elements a row
    scratch: SCRATCH_BYTES of this thread
    """
    groups = -(-num_panels // panels_at_once)
    block, group = unit // groups, unit % groups
    first_row = block * BLOCK_ROWS
    first_panel = group * panels_at_once
    last_panel = min(first_panel + panels_at_once, num_panels)
    x += first_row * _row_bytes(kind, depth)
    scales += first_row * _factor_bytes(kind, depth)
    out += first_row * ldo * 4
    start = 0
    while start < depth:
        _multiply_panels(
            kind, min(BLOCK_ROWS, rows - first_row), x, scales, depth, w, w_scales, start, first_panel, last_panel,
            out, ldo, 1 if adds != 0 or start > 0 else 0, scratch,
        )  # fmt: skip
        start += BLOCK_DEPTH


multiply_unit = by_name(_multiply_unit)
