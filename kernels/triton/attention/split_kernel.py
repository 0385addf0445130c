"""Split-KV attention for sequences with few new tokens (Dao et al. 2023, "Flash-Decoding"), and its reduction.

The split kernel attends to the splits of a context in parallel and leaves a partial result of each; the combine kernel
reduces the partials of a row.
"""

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
    k_scales_ptr,
    v_scales_ptr,
    tiles_ptr,
    partial_starts_ptr,
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
    HAS_SCALES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
):
    # grid: [num_tiles, num_kv_heads, num_programs]; one program attends with one tile to every num_programs-th split
    kv_head = tl.program_id(1).to(tl.int64)
    seq = tl.load(tiles_ptr + 2 * tl.program_id(0)).to(tl.int64)
    first_query = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)
    first_token = tl.load(query_starts_ptr + seq).to(tl.int32)
    num_queries = tl.load(query_starts_ptr + seq + 1).to(tl.int32) - first_token
    num_computed = seq_len - num_queries
    first_seen, end_key = seen_keys(seq_len, num_computed, first_query, window, NUM_ROWS // GROUP, HAS_WINDOW, HAS_TREE)
    first_split = first_seen // SPLIT_SIZE
    end_split = tl.cdiv(end_key, SPLIT_SIZE)
    # A sequence of length 0 has no splits; a graph-safe partition has tiles for more queries than a sequence has.
    if (first_split + tl.program_id(2) >= end_split) | (first_query >= num_queries):
        return

    rows = tl.arange(0, NUM_ROWS)
    queries = first_query + rows // GROUP
    is_row = (queries < num_queries) & (rows < NUM_ROWS // GROUP * GROUP)
    tokens = (first_token + queries).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, PADDED_DIM)
    is_element = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    row_offsets = tokens * stride_q_token + heads * stride_q_head
    q = tl.load(q_ptr + row_offsets[:, None] + dims[None, :], mask=is_element, other=0.0)
    last_keys = num_computed + queries
    query_depths = last_keys
    if HAS_DEPTHS:
        query_depths = tl.load(depths_ptr + tokens, mask=is_row, other=0).to(tl.int32)
    table_ptr = tables_ptr + seq * stride_table
    k_ptr += kv_head * stride_cache_head
    v_ptr += kv_head * stride_cache_head
    if HAS_SCALES:
        k_scales_ptr += kv_head * (stride_cache_head // 4)
        v_scales_ptr += kv_head * (stride_cache_head // 4)
    first_partial = tl.load(partial_starts_ptr + seq).to(tl.int64)
    first_partials = first_partial + queries.to(tl.int64) * tl.cdiv(seq_len, SPLIT_SIZE)

    for split in tl.range(first_split + tl.program_id(2), end_split, tl.num_programs(2)):
        start = tl.maximum(split * SPLIT_SIZE, first_seen // NUM_KEYS * NUM_KEYS)
        acc, l_i, m_i = attend(
            tl.zeros([NUM_ROWS, PADDED_DIM], tl.float32),
            tl.zeros([NUM_ROWS], tl.float32),
            tl.full([NUM_ROWS], float("-inf"), tl.float32),
            q,
            start,
            first_seen,
            tl.minimum((split + 1) * SPLIT_SIZE, end_key),
            last_keys,
            query_depths,
            tokens,
            num_computed,
            first_token,
            table_ptr,
            k_ptr,
            v_ptr,
            k_scales_ptr,
            v_scales_ptr,
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
            HAS_SCALES,
        )
        values, sums, outputs = finish(acc, l_i, m_i, sinks_ptr, heads, is_row, HAS_SINKS)
        if end_split - first_split == 1:  # the only split: nothing to combine
            targets = out_ptr + (tokens * stride_out_token + heads * stride_out_head)[:, None] + dims[None, :]
            tl.store(targets, outputs.to(out_ptr.dtype.element_ty), mask=is_element)
        else:
            partial_heads = (first_partials + split) * NUM_HEADS + heads
            tl.store(values_ptr + partial_heads[:, None] * HEAD_DIM + dims[None, :], values, mask=is_element)
            tl.store(sums_ptr + partial_heads, sums, mask=is_row)


@triton.jit
def combine_kernel(
    values_ptr,
    sums_ptr,
    out_ptr,
    query_starts_ptr,
    seq_lens_ptr,
    sinks_ptr,
    queries_ptr,
    partial_starts_ptr,
    window,
    stride_out_token,
    stride_out_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERIES_PER_TILE: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    # grid: [num_queries, num_heads]; one program reduces the partials of one query and head
    head = tl.program_id(1)
    seq = tl.load(queries_ptr + 2 * tl.program_id(0)).to(tl.int64)
    query = tl.load(queries_ptr + 2 * tl.program_id(0) + 1)
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)
    first_token = tl.load(query_starts_ptr + seq).to(tl.int32)
    num_queries = tl.load(query_starts_ptr + seq + 1).to(tl.int32) - first_token
    first_query = query // QUERIES_PER_TILE * QUERIES_PER_TILE
    first_seen, end_key = seen_keys(
        seq_len, seq_len - num_queries, first_query, window, QUERIES_PER_TILE, HAS_WINDOW, HAS_TREE
    )
    first_split = first_seen // SPLIT_SIZE
    end_split = tl.cdiv(end_key, SPLIT_SIZE)
    if (end_split - first_split <= 1) | (query >= num_queries):  # written by the split kernel, or no query
        return
    first_partial = tl.load(partial_starts_ptr + seq).to(tl.int64) + query.to(tl.int64) * tl.cdiv(seq_len, SPLIT_SIZE)
    dims = tl.arange(0, PADDED_DIM)
    acc = tl.zeros([PADDED_DIM], tl.float32)
    l_i = 0.0
    m_i = float("-inf")
    # in groups that begin at split 0, so that the order of the sums does not depend on how queries were tiled
    for start in tl.range(first_split // SPLITS_AT_ONCE * SPLITS_AT_ONCE, end_split, SPLITS_AT_ONCE):
        splits = start + tl.arange(0, SPLITS_AT_ONCE)
        is_split = (splits >= first_split) & (splits < end_split)
        partial_heads = (first_partial + splits) * NUM_HEADS + head
        sums = tl.load(sums_ptr + partial_heads, mask=is_split, other=float("-inf"))
        is_element = is_split[:, None] & (dims < HEAD_DIM)[None, :]
        values = tl.load(values_ptr + partial_heads[:, None] * HEAD_DIM + dims[None, :], mask=is_element, other=0.0)
        top = tl.maximum(m_i, tl.max(sums, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp2(m_i - base)
        weights = tl.exp2(sums - base)
        l_i = l_i * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(values * weights[:, None], 0)
        m_i = top
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        l_i += tl.exp2(sink - m_i)
    out_offset = (first_token + query).to(tl.int64) * stride_out_token + head * stride_out_head
    output = (acc / l_i).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offset + dims, output, mask=dims < HEAD_DIM)
