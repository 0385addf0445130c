"""Attention of short queries: pieces of the context in parallel, and the joint of the pieces."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.attention.tile import attend, finish, seen_keys
from kernels.triton.compat import LOG2E


@triton.jit
def split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tables_ptr,
    query_starts_ptr,
    seq_lens_ptr,
    mask_ptr,
    depths_ptr,
    sinks_ptr,
    tiles_ptr,
    item_starts_ptr,
    values_ptr,
    sums_ptr,
    scale,
    window,
    soft_cap,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_cache_block,
    stride_cache_head,
    stride_cache_slot,
    stride_table,
    stride_mask,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_DEPTHS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
):
    # grid: [num_tiles, num_kv_heads, num_programs]; one program attends with one tile to every num_programs-th piece
    kv_head = tl.program_id(1).to(tl.int64)
    seq = tl.load(tiles_ptr + 2 * tl.program_id(0)).to(tl.int64)
    first_query = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)
    first_token = tl.load(query_starts_ptr + seq).to(tl.int32)
    num_queries = tl.load(query_starts_ptr + seq + 1).to(tl.int32) - first_token
    num_computed = seq_len - num_queries
    first_seen, end_key = seen_keys(seq_len, num_computed, first_query, window, NUM_ROWS // GROUP, HAS_WINDOW, HAS_TREE)
    first_piece = first_seen // SPLIT_SIZE
    end_piece = tl.cdiv(end_key, SPLIT_SIZE)
    # A sequence of length 0 has no piece at all; a plan for any lengths has tiles of queries that are not there.
    if (first_piece + tl.program_id(2) >= end_piece) | (first_query >= num_queries):
        return

    rows = tl.arange(0, NUM_ROWS)
    queries = first_query + rows // GROUP
    is_row = (queries < num_queries) & (rows < NUM_ROWS // GROUP * GROUP)
    tokens = (first_token + queries).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, PADDED_DIM)
    is_element = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    places = tokens * stride_q_token + heads * stride_q_head
    q = tl.load(q_ptr + places[:, None] + dims[None, :], mask=is_element, other=0.0)
    last_keys = num_computed + queries
    query_depths = last_keys
    if HAS_DEPTHS:
        query_depths = tl.load(depths_ptr + tokens, mask=is_row, other=0).to(tl.int32)
    table_ptr = tables_ptr + seq * stride_table
    k_ptr += kv_head * stride_cache_head
    v_ptr += kv_head * stride_cache_head
    first_item = tl.load(item_starts_ptr + seq).to(tl.int64)
    items = first_item + queries.to(tl.int64) * tl.cdiv(seq_len, SPLIT_SIZE)

    for piece in tl.range(first_piece + tl.program_id(2), end_piece, tl.num_programs(2)):
        start = tl.maximum(piece * SPLIT_SIZE, first_seen // NUM_KEYS * NUM_KEYS)
        acc, total, peak = attend(
            tl.zeros([NUM_ROWS, PADDED_DIM], tl.float32),
            tl.zeros([NUM_ROWS], tl.float32),
            tl.full([NUM_ROWS], float("-inf"), tl.float32),
            q,
            start,
            first_seen,
            tl.minimum((piece + 1) * SPLIT_SIZE, end_key),
            last_keys,
            query_depths,
            tokens,
            num_computed,
            first_token,
            table_ptr,
            k_ptr,
            v_ptr,
            mask_ptr,
            depths_ptr,
            scale,
            window,
            soft_cap,
            stride_cache_block,
            stride_cache_slot,
            stride_mask,
            is_row,
            HEAD_DIM,
            PADDED_DIM,
            BLOCK_SIZE,
            NUM_KEYS,
            STAGES,
            True,
            HAS_WINDOW,
            HAS_SOFT_CAP,
            HAS_TREE,
            HAS_DEPTHS,
        )
        values, sums, joined = finish(acc, total, peak, sinks_ptr, heads, is_row, HAS_SINKS)
        if end_piece - first_piece == 1:  # nothing to join
            outputs = out_ptr + (tokens * stride_out_token + heads * stride_out_head)[:, None] + dims[None, :]
            tl.store(outputs, joined.to(out_ptr.dtype.element_ty), mask=is_element)
        else:
            item_heads = (items + piece) * NUM_HEADS + heads
            tl.store(values_ptr + item_heads[:, None] * HEAD_DIM + dims[None, :], values, mask=is_element)
            tl.store(sums_ptr + item_heads, sums, mask=is_row)


@triton.jit
def joint_kernel(
    values_ptr,
    sums_ptr,
    out_ptr,
    query_starts_ptr,
    seq_lens_ptr,
    sinks_ptr,
    rows_ptr,
    item_starts_ptr,
    window,
    stride_out_token,
    stride_out_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERIES_PER_TILE: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    PIECES_AT_ONCE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    # grid: [num_rows, num_heads]; one program joins the pieces of one query and head
    head = tl.program_id(1)
    seq = tl.load(rows_ptr + 2 * tl.program_id(0)).to(tl.int64)
    query = tl.load(rows_ptr + 2 * tl.program_id(0) + 1)
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)
    first_token = tl.load(query_starts_ptr + seq).to(tl.int32)
    num_queries = tl.load(query_starts_ptr + seq + 1).to(tl.int32) - first_token
    first_query = query // QUERIES_PER_TILE * QUERIES_PER_TILE
    first_seen, end_key = seen_keys(
        seq_len, seq_len - num_queries, first_query, window, QUERIES_PER_TILE, HAS_WINDOW, HAS_TREE
    )
    first_piece = first_seen // SPLIT_SIZE
    end_piece = tl.cdiv(end_key, SPLIT_SIZE)
    if (end_piece - first_piece <= 1) | (query >= num_queries):  # written by the split kernel, or not there
        return
    item = tl.load(item_starts_ptr + seq).to(tl.int64) + query.to(tl.int64) * tl.cdiv(seq_len, SPLIT_SIZE)
    dims = tl.arange(0, PADDED_DIM)
    acc = tl.zeros([PADDED_DIM], tl.float32)
    total = 0.0
    peak = float("-inf")
    # counted from piece 0, so that the order of the sums does not depend on how queries were tiled
    for start in tl.range(first_piece // PIECES_AT_ONCE * PIECES_AT_ONCE, end_piece, PIECES_AT_ONCE):
        pieces = start + tl.arange(0, PIECES_AT_ONCE)
        is_piece = (pieces >= first_piece) & (pieces < end_piece)
        places = (item + pieces) * NUM_HEADS + head
        sums = tl.load(sums_ptr + places, mask=is_piece, other=float("-inf"))
        is_element = is_piece[:, None] & (dims < HEAD_DIM)[None, :]
        values = tl.load(values_ptr + places[:, None] * HEAD_DIM + dims[None, :], mask=is_element, other=0.0)
        top = tl.maximum(peak, tl.max(sums, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp2(peak - base)
        weights = tl.exp2(sums - base)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(values * weights[:, None], 0)
        peak = top
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total += tl.exp2(sink - peak)
    place = (first_token + query).to(tl.int64) * stride_out_token + head * stride_out_head
    joined = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place + dims, joined, mask=dims < HEAD_DIM)
