"""Attention over a paged KV cache. A unit of work, done by one thread, is some queries of one sequence by one KV head.

Online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022, section 3.1) over spans of keys that begin at multiples
of SPAN in the sequence: the order of a row's sums depends on the row's position alone.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types

from kernels.numba.core.formats import BFLOAT16, FLOAT32, INT8
from kernels.numba.core.lanes import LANES, exponentiate, largest_of, multiply_vectors
from kernels.numba.core.memory import codes, flags, floats, integers, words
from kernels.numba.core.paged_tiles import (
    PARTS_AHEAD,
    score_bfloat16,
    score_float16,
    score_float32,
    score_int8,
    weigh_bfloat16,
    weigh_float16,
    weigh_float32,
    weigh_int8,
)
from kernels.numba.core.tiles import FLOAT_TILES, prefetch_line, rows_of_next_tile, shape_of_next_tile
from kernels.numba.kernel_cache import by_name, kernel

SPAN = 128  # keys scored at once; a multiple of LANES
TILE_ROWS = 48  # (token, query head) rows of a unit, unless one token has more heads
_MASKED = np.float32(-1e30)  # score of a key that the row does not attend to
_LOWEST = np.float32(-1e29)  # the running maximum before the first score: e^(_MASKED - _LOWEST) is 0

MAX_PARTS = SPAN // LANES  # of a span; a part lies in one block of the cache
# of parts, keys' and values': addresses, and scales, which only 8-bit caches have
SCRATCH_FLOATS = 4 * (MAX_PARTS + PARTS_AHEAD) + 2 * SPAN
SCRATCH_FLOATS_PER_ROW = SPAN + 3  # beside two times the head size
NUM_TILE_FIELDS = 6


def copied_floats(size: int, block: int) -> int:
    """Of a span's keys and values, where those of a tree's row are put in order."""
    return MAX_PARTS * size * (block + LANES)


@kernel(types.int64(*[types.int64] * 7))
def cut_tiles(query_starts, seq_lens, num_seqs, tokens_at_once, tables, table_bytes, tiles):
    """Cuts a step's rows into tiles of one sequence each, and returns how many there are: at most one for each row.

    query_starts: int64 [num_seqs + 1], where each sequence's rows begin; seq_lens: int64 [num_seqs], its context
    tables: address of the first sequence's block table; table_bytes: from one to the next
    tiles: int64 [>= rows, NUM_TILE_FIELDS]: first row of the tile, its rows, context, first row and rows of the
    sequence, address of its block table. The last tiles come first: prompts follow the decoding rows of a step, and
    long work should not end it
    """
    starts, lengths = integers(query_starts, num_seqs + 1), integers(seq_lens, num_seqs)
    num_tiles = 0
    for seq in range(num_seqs - 1, -1, -1):
        first, last = starts[seq], starts[seq + 1]
        for index in range(-(-(last - first) // tokens_at_once) - 1, -1, -1):
            row = first + index * tokens_at_once
            tile = integers(tiles + num_tiles * NUM_TILE_FIELDS * 8, NUM_TILE_FIELDS)
            tile[0], tile[1] = row, min(tokens_at_once, last - row)
            tile[2], tile[3], tile[4] = lengths[seq], first, last - first
            tile[5] = tables + seq * table_bytes
            num_tiles += 1
    return num_tiles


@njit(inline="always")  # as `_add_values`: tiles are compiled where they are called
def _score(kind, rows, x, size, parts, block, num_parts, out, ldo):
    """out = x @ keys, [rows, num_parts * LANES]. parts: addresses of LANES keys each, as columns"""
    row = 0
    while row < rows:
        panels, most = shape_of_next_tile(rows - row, num_parts, FLOAT_TILES)
        tile = rows_of_next_tile(rows - row, most)
        source, target = x + row * size * 4, out + row * ldo * 4
        part = 0
        while part < num_parts:
            if part + panels > num_parts:
                panels = 1
            count = (num_parts - part) // panels * panels
            scores = target + part * LANES * 4
            arguments = (tile, panels, source, size, parts + part * 8, block, size, count, scores, ldo)
            if kind == FLOAT32:
                score_float32(arguments)
            elif kind == BFLOAT16:
                score_bfloat16(arguments)
            elif kind == INT8:
                score_int8(arguments)
            else:
                score_float16(arguments)
            part += count
        row += tile


@njit(inline="always")
def _add_values(kind, rows, x, ldx, parts, skipped, depth, out, size, element):
    """out += x @ values, [rows, size]. parts: addresses of LANES values each, `depth` in all, of which the first
    `skipped` are left out; element: bytes"""
    row = 0
    while row < rows:
        panels, most = shape_of_next_tile(rows - row, size // LANES, FLOAT_TILES)
        tile = rows_of_next_tile(rows - row, most)
        source = x + row * ldx * 4
        column = 0
        while column < size:
            if column + panels * LANES > size:
                panels = 1
            target, offset = out + (row * size + column) * 4, column * element
            arguments = (tile, panels, source, ldx, parts, offset, size, skipped, depth, target, size)
            if kind == FLOAT32:
                weigh_float32(arguments)
            elif kind == BFLOAT16:
                weigh_bfloat16(arguments)
            elif kind == INT8:
                weigh_int8(arguments)
            else:
                weigh_float16(arguments)
            column += panels * LANES
        row += tile


@njit
def _copy_queries(qkv, target, first_token, num_tokens, group, first_head, row_floats, size, scale):
    """Rows (token, head of the group), times the scale: [num_tokens * group, size]"""
    for token in range(num_tokens):
        for head in range(group):
            source = floats(qkv + ((first_token + token) * row_floats + (first_head + head) * size) * 4, size)
            row = floats(target + (token * group + head) * size * 4, size)
            for i in range(size):
                row[i] = source[i] * scale


@njit
def _start_rows(sums, states, rows, size):
    """Nothing was summed yet."""
    totals = floats(sums, rows * size)
    for i in range(rows * size):
        totals[i] = np.float32(0.0)
    for row in range(rows):
        state = floats(states + row * 8, 2)
        state[0], state[1] = _LOWEST, np.float32(0.0)


@njit
def _first_key(positions, first_token, num_tokens, window):
    """The first key that any of the tokens attends to: the blocks before it may hold NaN, or another sequence."""
    if window == 0:
        return 0
    low = positions[first_token]  # in a tree, positions do not ascend
    for token in range(first_token, first_token + num_tokens):
        low = min(low, positions[token])
    return max(0, low - window + 1)


@njit
def _mask(scores, count, start, low, high):
    """Masks the scores of `count` keys from key `start` on that are outside of low..high - 1."""
    for key in range(count):
        if start + key < low or start + key >= high:
            scores[key] = _MASKED


@njit
def _copy_codes(keys, values, block, size, offset, lane, is_token, key_part, value_part, key_scales, value_scales):
    """Copies the codes and scales of the token at `offset` of a block to place `lane`, or zeros if it is no token."""
    column, target_column = codes(keys, size * block), codes(key_part, size * block)
    row, target_row = codes(values + offset * size, size), codes(value_part + lane * size, size)
    for i in range(size):
        target_column[i * block + lane] = column[i * block + offset] if is_token else np.int8(0)
        target_row[i] = row[i] if is_token else np.int8(0)
    scales_at = block * size
    for part, target in ((keys, key_scales), (values, value_scales)):
        scale = floats(part + scales_at, block)[offset] if is_token else np.float32(0.0)
        floats(target, LANES)[lane] = scale


@njit
def _copy_scales(part, target):
    source, scales = floats(part, LANES), floats(target, LANES)
    for lane in range(LANES):
        scales[lane] = source[lane]


@njit
def _prefetch_scales(keys, values, pages, block, block_bytes, size, first, last):
    """Of the keys first..last - 1: they are read before the codes that they lie behind."""
    for key in range(first, last, LANES):
        distance = pages[key // block] * block_bytes + block * size + key % block * 4
        prefetch_line(keys + distance)
        prefetch_line(values + distance)


@njit
def _copy_path(
    keys, values, pages, block, block_bytes, size, element, first_key, count, first_new, tree, ancestor, ancestor_at,
    key_part, value_part, key_scales, value_scales,
):  # fmt: skip
    """Copies the keys and values of `count` tokens of a row's path, from position `first_key` on, to where a chain of
    them would have them: a row of a tree is then summed as the same row of a chain is, to the last bit.

    The tokens before `first_new` lie in order. After those come the row's ancestors, which `tree` shows among the rows
    of the step; `ancestor` is the row of the last one that was copied, and `ancestor_at` its position.
    Returns these two as they are then. The rest of a part is zeros.
    """
    shown, width = flags(tree, 1 << 30), element // 2  # words of an element, if it is one of those
    for lane in range(LANES):
        source = first_key + lane
        if lane < count and source >= first_new:
            while ancestor_at < source:
                ancestor += 1
                if shown[ancestor] != 0:
                    ancestor_at += 1
            source = first_new + ancestor
        page, offset = pages[source // block] * block_bytes if lane < count else 0, source % block
        if element == 1:
            _copy_codes(
                keys + page, values + page, block, size, offset, lane, lane < count, key_part, value_part, key_scales,
                value_scales,
            )  # fmt: skip
            continue
        column, target_column = words(keys + page, size * block * width), words(key_part, size * block * width)
        row = words(values + page + offset * size * element, size * width)
        target_row = words(value_part + lane * size * element, size * width)
        for i in range(size):
            for word in range(width):
                value = column[(i * block + offset) * width + word] if lane < count else np.int16(0)
                target_column[(i * block + lane) * width + word] = value
        for i in range(size * width):
            target_row[i] = row[i] if lane < count else np.int16(0)
    return ancestor, ancestor_at


@njit
def _find_parts(
    kind, keys, values, pages, block, block_bytes, size, element, first_key, num_parts, next_span, last, first_copied,
    first_new, tree, ancestor, ancestor_at, keys_at, values_at, key_scales, value_scales, copied_keys, copied_values,
):  # fmt: skip
    """Writes down the addresses of a span's parts, of what is to be prefetched behind them, and their scales.

    first_key: of the first part; next_span: the first key of the next one; last: one past the last key of all spans
    first_copied: from which on keys and values are copied, as `_copy_path` does, whose state is returned
    keys_at, values_at: int64 [MAX_PARTS + PARTS_AHEAD]; key_scales, value_scales: float32 [SPAN]
    """
    key_parts, value_parts = integers(keys_at, MAX_PARTS + PARTS_AHEAD), integers(values_at, MAX_PARTS + PARTS_AHEAD)
    for part in range(num_parts):
        key, scales_at = first_key + part * LANES, part * LANES * 4
        if key + LANES > first_copied and first_copied < last:
            key_parts[part] = copied_keys + part * size * block * element
            value_parts[part] = copied_values + part * LANES * size * element
            ancestor, ancestor_at = _copy_path(
                keys, values, pages, block, block_bytes, size, element, key, min(LANES, last - key), first_new, tree,
                ancestor, ancestor_at, key_parts[part], value_parts[part], key_scales + scales_at,
                value_scales + scales_at,
            )  # fmt: skip
            continue
        page, offset = pages[key // block] * block_bytes, key % block
        key_parts[part] = keys + page + offset * element
        value_parts[part] = values + page + offset * size * element
        if kind == INT8:
            distance = page + block * size + offset * 4
            _copy_scales(keys + distance, key_scales + scales_at)
            _copy_scales(values + distance, value_scales + scales_at)
    if kind == INT8:
        _prefetch_scales(keys, values, pages, block, block_bytes, size, next_span, min(next_span + SPAN, last))
    for ahead in range(PARTS_AHEAD):
        key_parts[num_parts + ahead] = value_parts[min(ahead, num_parts - 1)]
        key = min(next_span + ahead * LANES, last - 1)
        value_parts[num_parts + ahead] = (
            keys + pages[key // block] * block_bytes + key % block // LANES * LANES * element
        )
    return ancestor, ancestor_at


@njit(fastmath={"contract"})
def _cap(scores, count, soft_cap):
    """score = soft_cap * tanh(score / soft_cap) (Gemma 2, section 2)"""
    for key in range(count):
        scores[key] = soft_cap * np.float32(math.tanh(scores[key] / soft_cap))


@njit
def _update_softmax(address, num_vectors, out, size, state):
    """Advances the online softmax of one row: scores become weights. address: of the scores, [num_vectors * LANES]

    state: [2], m and l: the running maximum, and the sum of weights relative to it
    """
    largest = largest_of(address, num_vectors, state[0])
    factor = np.float32(math.exp(state[0] - largest)) if state[0] > _LOWEST else np.float32(0.0)
    if factor != np.float32(1.0):
        for i in range(size):
            out[i] *= factor
    state[1] = state[1] * factor + exponentiate(address, num_vectors, largest)
    state[0] = largest


@njit
def _write_outputs(out, sums, states, first_token, group, kv_head, num_heads, size, rows):
    """out = sums of weighted values / sums of weights"""
    for row in range(rows):
        token, head = row // group, row % group
        target = floats(out + ((first_token + token) * num_heads + kv_head * group + head) * size * 4, size)
        source = floats(sums + row * size * 4, size)
        inverse = np.float32(1.0) / floats(states + row * 8, 2)[1]
        for i in range(size):
            target[i] = source[i] * inverse


@kernel(types.void(*[types.int64] * 5, types.float32, types.float32, *[types.int64] * 18))
def _attend_unit(
    qkv, out, num_heads, num_kv_heads, size, scale, soft_cap, window, keys, values, kind, block,
    block_bytes, head_bytes, first_token, num_tokens, kv_head, context, first_row, num_new, positions, tables,
    tree, tree_width, scratch,
):  # fmt: skip
    """As `kernels.reference.attention.paged_attention`, for `num_tokens` tokens of one sequence and one KV head.

    qkv: float32 [rows, (num_heads + 2 * num_kv_heads) * size]; out: float32 [rows, num_heads * size]
    first_token: the row of the step that is the first of the tokens
    keys, ..., head_bytes: the paged cache, as of `rotate_and_store_rows`; tables: int64, the blocks of the sequence
    context: tokens of the sequence in the cache, this step's included: num_new of them, from row first_row on
    positions: int64 [rows], of each row in its sequence; tree: uint8 [rows, tree_width], which of the sequence's rows
    of this step a row attends to, or address 0 where attention is causal
    window: keys that a query attends to, itself included, or 0 for all; soft_cap: of the scores, or 0
    scratch: float32 [SCRATCH_FLOATS + num_tokens * group * (2 * size + SCRATCH_FLOATS_PER_ROW) + copied_floats(size,
    block)] of this thread
    """
    group = num_heads // num_kv_heads
    rows = num_tokens * group
    element = 4 if kind == FLOAT32 else 1 if kind == INT8 else 2
    keys, values = keys + kv_head * head_bytes, values + kv_head * head_bytes
    pages = integers(tables, (context + block - 1) // block)
    keys_at, values_at = scratch, scratch + (MAX_PARTS + PARTS_AHEAD) * 8
    key_scales = scratch + 2 * (MAX_PARTS + PARTS_AHEAD) * 8
    value_scales = key_scales + SPAN * 4
    queries = scratch + SCRATCH_FLOATS * 4
    sums, scores = queries + rows * size * 4, queries + 2 * rows * size * 4
    states = scores + rows * SPAN * 4
    copied_keys = states + rows * 2 * 4
    copied_values = copied_keys + MAX_PARTS * size * block * 4
    _copy_queries(
        qkv,
        queries,
        first_token,
        num_tokens,
        group,
        kv_head * group,
        (num_heads + 2 * num_kv_heads) * size,
        size,
        scale,
    )
    _start_rows(sums, states, rows, size)
    row_positions = integers(positions, first_token + num_tokens)
    low = _first_key(row_positions, first_token, num_tokens, window)
    first_new = context - num_new
    # Of a tree, all rows see the spans before the step's own keys; what follows is of each row alone: its ancestors.
    for index in range(1 if tree == 0 else 1 + num_tokens):
        begin_row, end_row, start = 0, rows, low // SPAN * SPAN
        if tree == 0:
            last = row_positions[first_token + num_tokens - 1] + 1  # one past the last key that any row attends to
        elif index == 0:
            last = first_new // SPAN * SPAN
        else:
            begin_row, end_row = (index - 1) * group, index * group
            start = max(start, first_new // SPAN * SPAN)
            last = row_positions[first_token + index - 1] + 1
        ancestor, ancestor_at = -1, first_new - 1
        first_copied = last if index == 0 else first_new
        while start < last:
            count = min(SPAN, last - start)
            num_vectors = -(-count // LANES)
            num_scored = num_vectors * LANES
            num_skipped = max(0, low - start)
            first = num_skipped // LANES * LANES  # whole parts before `low` are skipped
            num_parts = num_vectors - first // LANES
            ancestor, ancestor_at = _find_parts(
                kind, keys, values, pages, block, block_bytes, size, element, start + first, num_parts, start + SPAN,
                last, first_copied, first_new, tree + (first_token + index - 1) * tree_width, ancestor, ancestor_at,
                keys_at, values_at, key_scales, value_scales, copied_keys, copied_values,
            )  # fmt: skip
            _score(
                kind, end_row - begin_row, queries + begin_row * size * 4, size, keys_at, block, num_parts,
                scores + (begin_row * SPAN + first) * 4, SPAN,
            )  # fmt: skip
            for row in range(begin_row, end_row):
                own = row_positions[first_token + row // group]
                row_scores = floats(scores + row * SPAN * 4, num_scored)
                if kind == INT8:
                    multiply_vectors(scores + (row * SPAN + first) * 4, key_scales, num_parts)
                if soft_cap != np.float32(0.0):
                    _cap(row_scores, num_scored, soft_cap)
                row_low = max(0, own - window + 1) if window != 0 else 0
                if start < row_low or start + num_scored > own + 1:
                    _mask(row_scores, num_scored, start, row_low, own + 1)
                row_sums, state = floats(sums + row * size * 4, size), floats(states + row * 8, 2)
                _update_softmax(scores + row * SPAN * 4, num_vectors, row_sums, size, state)
                if kind == INT8:
                    multiply_vectors(scores + (row * SPAN + first) * 4, value_scales, num_parts)
            _add_values(
                kind, end_row - begin_row, scores + (begin_row * SPAN + first) * 4, SPAN, values_at,
                num_skipped - first, count - first, sums + begin_row * size * 4, size, element,
            )  # fmt: skip
            start += SPAN
    _write_outputs(out, sums, states, first_token, group, kv_head, num_heads, size, rows)


attend_unit = by_name(_attend_unit)
