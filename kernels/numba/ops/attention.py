"""Attention over a paged KV cache: a unit of work is some queries of one sequence by one head of keys.

The softmax is computed while the keys pass by (Milakov and Gimelshein, 2018; Dao et al., 2022, section 3.1), in spans
that begin at multiples of SPAN in the sequence: where a row's sums are cut depends on the row's position alone.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types

from kernels.numba.core.formats import BFLOAT16, FLOAT32
from kernels.numba.core.lanes import LANES, exponentiate, largest_of
from kernels.numba.core.memory import flags, floats, integers
from kernels.numba.core.tiles import (
    PARTS_AHEAD,
    rows_of_next_tile,
    score_bfloat16,
    score_float16,
    score_float32,
    weigh_bfloat16,
    weigh_float16,
    weigh_float32,
)
from kernels.numba.kernel_cache import kernel

SPAN = 128  # keys scored at once; a multiple of LANES
TILE_ROWS = 48  # (token, query head) rows of a unit, unless one token has more heads
_UNSEEN = np.float32(-1e30)  # score of a key that the row may not see
_LOWEST = np.float32(-1e29)  # largest score before there was any: e^(_UNSEEN - _LOWEST) is 0

MAX_PARTS = SPAN // LANES  # of a span; a part lies in one block of the cache
SCRATCH_FLOATS = 4 * (MAX_PARTS + PARTS_AHEAD)  # addresses of parts, keys' and values'
SCRATCH_FLOATS_PER_ROW = SPAN + 3  # beside two times the head size


@kernel(types.void(*[types.int64] * 9))
def _score(kind, rows, x, size, parts, block, num_parts, out, ldo):
    """out = x @ keys, [rows, num_parts * LANES]. parts: addresses of LANES keys each, as columns"""
    row = 0
    while row < rows:
        tile = rows_of_next_tile(rows - row)
        source, target = x + row * size * 4, out + row * ldo * 4
        if kind == FLOAT32:
            score_float32((tile, source, size, parts, 0, block, 0, size, num_parts, target, ldo))
        elif kind == BFLOAT16:
            score_bfloat16((tile, source, size, parts, 0, block, 0, size, num_parts, target, ldo))
        else:
            score_float16((tile, source, size, parts, 0, block, 0, size, num_parts, target, ldo))
        row += tile


@kernel(types.void(*[types.int64] * 10))
def _weigh(kind, rows, x, ldx, parts, skipped, depth, out, size, element):
    """out += x @ values, [rows, size]. parts: addresses of LANES values each, of `depth` in all, of which the first
    `skipped` are not looked at; element: bytes"""
    num_parts = -(-depth // LANES)
    row = 0
    while row < rows:
        tile = rows_of_next_tile(rows - row)
        source = x + row * ldx * 4
        for column in range(0, size, LANES):
            target, offset = out + (row * size + column) * 4, column * element
            if kind == FLOAT32:
                weigh_float32((tile, source, ldx, parts, offset, size, skipped, depth, num_parts, target, size))
            elif kind == BFLOAT16:
                weigh_bfloat16((tile, source, ldx, parts, offset, size, skipped, depth, num_parts, target, size))
            else:
                weigh_float16((tile, source, ldx, parts, offset, size, skipped, depth, num_parts, target, size))
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
def _hide(scores, count, start, low, high):
    """Masks what a row does not see of `count` keys from key `start` on: it sees those from `low` to `high` - 1."""
    for key in range(count):
        if start + key < low or start + key >= high:
            scores[key] = _UNSEEN


@njit
def _hide_drafts(scores, count, start, low, query_start, num_drafts, tree, positions):
    """Masks this step's own keys that the row's tree mask does not show, or that are before its window.

    tree: uint8 [num_drafts] of the row; positions: int64 [num_drafts] of the keys
    """
    shown, places = flags(tree, num_drafts), integers(positions, num_drafts)
    for draft in range(num_drafts):
        key = query_start + draft - start
        if 0 <= key < count and (shown[draft] == 0 or places[draft] < low):
            scores[key] = _UNSEEN


@njit(fastmath={"contract"})
def _cap(scores, count, soft_cap):
    """score = soft_cap * tanh(score / soft_cap) (Gemma 2, section 2)"""
    for key in range(count):
        scores[key] = soft_cap * np.float32(math.tanh(scores[key] / soft_cap))


@njit
def _soften(address, num_vectors, out, size, state):
    """One row of the running softmax. address: of its scores, [num_vectors * LANES]

    state: [2], the largest score so far and the sum of weights relative to it
    """
    largest = largest_of(address, num_vectors, state[0])
    factor = np.float32(math.exp(state[0] - largest)) if state[0] > _LOWEST else np.float32(0.0)
    if factor != np.float32(1.0):
        for i in range(size):
            out[i] *= factor
    state[1] = state[1] * factor + exponentiate(address, num_vectors, largest)
    state[0] = largest


@njit
def attend_unit(
    qkv, out, num_heads, num_kv_heads, size, scale, soft_cap, window, cache, kind, blocks, block,
    first_token, num_tokens, kv_head, context, first_row, num_new, positions, tables, tree, tree_width, scratch,
):  # fmt: skip
    """Attends for tokens first_token..+num_tokens (rows of the step) of one sequence with the heads of one key head.

    qkv: float32 [rows, (num_heads + 2 * num_kv_heads) * size]; out: float32 [rows, num_heads * size]
    cache: as `rotate_and_store_rows` writes it; tables: int64, the blocks of the sequence
    context: tokens of the sequence in the cache, this step's included: num_new of them, from row first_row on
    positions: int64 [rows], where each row stands in its text; tree: uint8 [rows, tree_width], which of the sequence's
    rows of this step a row sees, or 0 where each sees those before it
    window: keys that a query sees, itself included, or 0 for all; soft_cap: of the scores, or 0
    scratch: float32 [SCRATCH_FLOATS + num_tokens * group * (2 * size + SCRATCH_FLOATS_PER_ROW)] of this thread
    """
    group = num_heads // num_kv_heads
    rows = num_tokens * group
    element = 4 if kind == FLOAT32 else 2
    block_bytes = block * size * element
    keys = cache + kv_head * blocks * block_bytes
    values = keys + num_kv_heads * blocks * block_bytes
    pages = integers(tables, (context + block - 1) // block)
    keys_at, values_at = scratch, scratch + (MAX_PARTS + PARTS_AHEAD) * 8
    key_parts = integers(keys_at, MAX_PARTS + PARTS_AHEAD)
    value_parts = integers(values_at, MAX_PARTS + PARTS_AHEAD)
    queries = scratch + SCRATCH_FLOATS * 4
    sums = queries + rows * size * 4
    scores = sums + rows * size * 4
    states = scores + rows * SPAN * 4
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
    totals = floats(sums, rows * size)
    for i in range(rows * size):
        totals[i] = np.float32(0.0)
    for row in range(rows):
        state = floats(states + row * 8, 2)
        state[0], state[1] = _LOWEST, np.float32(0.0)
    places = integers(positions, first_token + num_tokens)
    low = 0  # keys before it are seen by no row: what they hold may be no number, and belong to others
    if window != 0:
        low = places[first_token]  # of a tree, a row may stand before the one above it
        for token in range(first_token, first_token + num_tokens):
            low = min(low, places[token])
        low = max(0, low - window + 1)
    last = context if tree != 0 else places[first_token + num_tokens - 1] + 1  # keys that some row sees
    start = low // SPAN * SPAN
    while start < last:
        count = min(SPAN, last - start)
        num_vectors = -(-count // LANES)
        num_scored = num_vectors * LANES
        unseen = max(0, low - start)
        first = unseen // LANES * LANES  # what is not a whole part of unseen keys
        num_parts = num_vectors - first // LANES
        for part in range(num_parts):
            key = start + first + part * LANES
            page, offset = pages[key // block] * block_bytes, key % block
            key_parts[part] = keys + page + offset * element
            value_parts[part] = values + page + offset * size * element
        for ahead in range(PARTS_AHEAD):  # what is read after them
            key_parts[num_parts + ahead] = value_parts[min(ahead, num_parts - 1)]
            key = min(start + SPAN + ahead * LANES, last - 1)
            value_parts[num_parts + ahead] = (
                keys + pages[key // block] * block_bytes + key % block // LANES * LANES * element
            )
        _score(kind, rows, queries, size, keys_at, block, num_parts, scores + first * 4, SPAN)
        for row in range(rows):
            own = places[first_token + row // group]
            row_scores = floats(scores + row * SPAN * 4, num_scored)
            if soft_cap != np.float32(0.0):
                _cap(row_scores, num_scored, soft_cap)
            row_low = max(0, own - window + 1) if window != 0 else 0
            high = own + 1 if tree == 0 else context
            if start < row_low or start + num_scored > high:
                _hide(row_scores, num_scored, start, row_low, high)
            if tree != 0:
                row_tree = tree + (first_token + row // group) * tree_width
                _hide_drafts(
                    row_scores, num_scored, start, row_low, context - num_new, num_new, row_tree,
                    positions + first_row * 8,
                )  # fmt: skip
            row_sums, state = floats(sums + row * size * 4, size), floats(states + row * 8, 2)
            _soften(scores + row * SPAN * 4, num_vectors, row_sums, size, state)
        _weigh(kind, rows, scores + first * 4, SPAN, values_at, unseen - first, count - first, sums, size, element)
        start += SPAN
    _write_means(out, sums, states, first_token, group, kv_head, num_heads, size, rows)


@kernel(types.void(*[types.int64] * 9))
def _write_means(out, sums, states, first_token, group, kv_head, num_heads, size, rows):
    """out = sums of weighted values / sums of weights"""
    for row in range(rows):
        token, head = row // group, row % group
        target = floats(out + ((first_token + token) * num_heads + kv_head * group + head) * size * 4, size)
        source = floats(sums + row * size * 4, size)
        inverse = np.float32(1.0) / floats(states + row * 8, 2)[1]
        for i in range(size):
            target[i] = source[i] * inverse
