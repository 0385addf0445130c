"""The kernel for sequences with many new tokens: one program per tile and KV head reads the whole context."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.attention.tile import attend, finish, seen_keys


@triton.jit
def prompt_kernel(
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
    NUM_ROWS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # grid: [num_tiles, num_kv_heads]; one program attends with one tile of queries to the whole context
    kv_head = tl.program_id(1).to(tl.int64)
    seq = tl.load(tiles_ptr + 2 * tl.program_id(0)).to(tl.int64)
    first_query = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)
    if seq_len == 0:
        return
    first_token = tl.load(query_starts_ptr + seq).to(tl.int32)
    num_queries = tl.load(query_starts_ptr + seq + 1).to(tl.int32) - first_token
    num_computed = seq_len - num_queries

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

    # keys:  | seen by all rows: no mask | seen by some: masked |    with a window:  | seen by none: skipped | masked |
    first_seen, end_key = seen_keys(seq_len, num_computed, first_query, window, NUM_ROWS // GROUP, HAS_WINDOW, HAS_TREE)
    first_masked = first_seen if HAS_WINDOW else num_computed
    if not HAS_WINDOW and not HAS_TREE:
        first_masked += first_query + 1
    first_masked = first_masked // NUM_KEYS * NUM_KEYS

    acc = tl.zeros([NUM_ROWS, PADDED_DIM], tl.float32)
    l_i = tl.zeros([NUM_ROWS], tl.float32)
    m_i = tl.full([NUM_ROWS], float("-inf"), tl.float32)
    table_ptr = tables_ptr + seq * stride_table
    k_ptr += kv_head * stride_cache_head
    v_ptr += kv_head * stride_cache_head
    if HAS_SCALES:
        k_scales_ptr += kv_head * (stride_cache_head // 4)
        v_scales_ptr += kv_head * (stride_cache_head // 4)
    for IS_MASKED in tl.static_range(1 if HAS_WINDOW else 0, 2):
        acc, l_i, m_i = attend(
            acc,
            l_i,
            m_i,
            q,
            first_masked if IS_MASKED else 0,
            first_seen,
            end_key if IS_MASKED else first_masked,
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
            IS_MASKED == 1,
            HAS_WINDOW,
            HAS_SOFT_CAP,
            HAS_TREE,
            HAS_DEPTHS,
            HAS_SCALES,
        )
    _, _, outputs = finish(acc, l_i, m_i, sinks_ptr, heads, is_row, HAS_SINKS)
    row_offsets = tokens * stride_out_token + heads * stride_out_head
    tl.store(out_ptr + row_offsets[:, None] + dims[None, :], outputs.to(out_ptr.dtype.element_ty), mask=is_element)
