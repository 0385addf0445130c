"""Online softmax of one tile of queries over a range of keys, shared by the prompt kernel and the split kernel.

Names are those of Dao et al. 2022, "FlashAttention", algorithm 1. Per row, *m_i* is the largest score so far, *l_i* the
sum of 2^(score - m_i), and *acc* the sum of the values with these weights. A *row* is a (query, head) pair of the tile.
Scores are in units of ln 2: exp2 is one instruction of a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.compat import LOG2E, dot, tanh
from kernels.triton.kv_codes import widen


@triton.jit
def seen_keys(
    seq_len,
    num_computed,
    first_query,
    window,
    QUERIES_PER_TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TREE: tl.constexpr,
):
    """The range of keys that any row of the tile sees: the first, and one past the last."""
    end_key = seq_len
    if not HAS_TREE:
        end_key = tl.minimum(seq_len, num_computed + first_query + QUERIES_PER_TILE)
    first_seen = 0
    if HAS_WINDOW:
        first_query_key = num_computed if HAS_TREE else num_computed + first_query
        first_seen = tl.maximum(first_query_key - window + 1, 0)
    return first_seen, end_key


@triton.jit
def attend(
    acc,
    l_i,
    m_i,
    q,
    first_key,  # a multiple of NUM_KEYS
    first_seen,  # keys before this one are hidden from all rows, and may be NaN
    end_key,
    last_keys,  # [NUM_ROWS] the last key that each row sees without a tree mask
    query_depths,  # [NUM_ROWS]
    query_tokens,  # [NUM_ROWS] rows of q
    num_computed,  # keys before this step's
    first_token,  # row of q of this step's first key
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
    stride_mask,  # words per row of the mask, 32 of the sequence's new tokens each
    is_row,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_DEPTHS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Adds the keys first_key .. end_key to the softmax of a tile. Without IS_MASKED, all rows see all of them."""
    dims = tl.arange(0, PADDED_DIM)
    for start in tl.range(first_key, end_key, NUM_KEYS, num_stages=STAGES):
        keys = start + tl.arange(0, NUM_KEYS)
        if IS_MASKED:
            is_key = (keys >= first_seen) & (keys < end_key)
            block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        else:
            block = tl.load(table_ptr + keys // BLOCK_SIZE).to(tl.int64)
        slots = block * stride_cache_block + (keys % BLOCK_SIZE) * stride_cache_slot
        offsets = slots[:, None] + dims[None, :]
        if IS_MASKED:
            is_element = is_key[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(k_ptr + offsets, mask=is_element, other=0.0)
            v = tl.load(v_ptr + offsets, mask=is_element, other=0.0)
        elif HEAD_DIM == PADDED_DIM:
            k = tl.load(k_ptr + offsets)
            v = tl.load(v_ptr + offsets)
        else:
            is_dim = (dims < HEAD_DIM)[None, :]
            k = tl.load(k_ptr + offsets, mask=is_dim, other=0.0)
            v = tl.load(v_ptr + offsets, mask=is_dim, other=0.0)
        if HAS_SCALES:
            places = block * (stride_cache_block // 4) + keys % BLOCK_SIZE
            is_scale = (keys >= first_seen) & (keys < end_key) if IS_MASKED else None
            k_scales = tl.load(k_scales_ptr + places, mask=is_scale, other=0.0 if IS_MASKED else None)
            v_scales = tl.load(v_scales_ptr + places, mask=is_scale, other=0.0 if IS_MASKED else None)
            k = widen(k, q.dtype)
            # not float16: a weight times a scale may be too small for it
            v = widen(v, tl.float32 if q.dtype == tl.float32 else tl.bfloat16)
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], NUM_KEYS], tl.float32))
        if HAS_SCALES:
            scores *= k_scales[None, :]
        scores = tanh(scores * (scale / soft_cap)) * (soft_cap * LOG2E) if HAS_SOFT_CAP else scores * (scale * LOG2E)
        if IS_MASKED:
            own = keys - num_computed  # the key's row among the sequence's new tokens
            is_own = (own >= 0) & is_key
            if HAS_TREE:
                first_word = (start - num_computed) >> 5
                is_marked = tree_marks(mask_ptr + query_tokens * stride_mask, stride_mask, first_word, own, is_row)
                sees = (is_marked & is_own[None, :]) | (is_key & (own < 0))[None, :]
            else:
                sees = (keys[None, :] <= last_keys[:, None]) & is_key[None, :]
            if HAS_WINDOW:
                key_depths = keys
                if HAS_DEPTHS:
                    depths = tl.load(depths_ptr + first_token + own, mask=is_own, other=0)
                    key_depths = tl.where(is_own, depths.to(tl.int32), keys)
                sees = sees & (key_depths[None, :] > query_depths[:, None] - window)
            scores = tl.where(sees, scores, float("-inf"))
        top = tl.maximum(m_i, tl.max(scores, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf is NaN
        shrink = tl.exp2(m_i - base)
        weights = tl.exp2(scores - base[:, None])
        l_i = l_i * shrink + tl.sum(weights, 1)
        if HAS_SCALES:
            weights *= v_scales[None, :]
        acc = dot(weights, v, acc * shrink[:, None])
        m_i = top
    return acc, l_i, m_i


@triton.jit
def tree_marks(row_ptrs, num_words, first_word, own, is_row):
    """Whether each row's mask names each key: that of the sequence's new token `own`, which may be none of them.

    row_ptrs: [NUM_ROWS], each row's words, num_words of them; first_word: in which the first key's bit lies
    """
    marks = tl.zeros([is_row.shape[0], own.shape[0]], tl.int32)
    for i in tl.static_range((own.shape[0] + 31) // 32 + 1):  # keys begin inside a word
        words = tl.where(is_row, first_word + i, -1)
        bits = tl.load(row_ptrs + words, mask=(words >= 0) & (words < num_words), other=0)
        marks = tl.where(((own >> 5) == first_word + i)[None, :], bits[:, None], marks)
    return ((marks >> (own & 31)[None, :]) & 1) != 0


@triton.jit
def finish(acc, l_i, m_i, sinks_ptr, heads, is_row, HAS_SINKS: tl.constexpr):
    """(values, sums, outputs) of each row: acc / l_i, the log2-sum-exp of its scores, and the values with the weight of
    the head's sink in the denominator. The first two are a partial; the last is the result if no key is missing."""
    is_empty = l_i == 0.0
    values = acc / tl.where(is_empty, 1.0, l_i)[:, None]
    sums = tl.where(is_empty, float("-inf"), m_i + tl.log2(tl.where(is_empty, 1.0, l_i)))
    outputs = values
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, mask=is_row, other=0.0).to(tl.float32) * LOG2E
        outputs = values / (1.0 + tl.exp2(sink - sums))[:, None]
    return values, sums, outputs
