"""Paged attention and the KV write, defined in plain torch: what every faster implementation must agree with.

Sizes: num_heads = num_kv_heads * group; a cache has num_blocks * block_size slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.kv_codes import decode, encode


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Writes the step's keys and values into their slots.

    k, v: [num_tokens, num_kv_heads, head_dim]
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]
    slots: [num_tokens], block * block_size + offset
    k_scales, v_scales: float32 [num_blocks, num_kv_heads, block_size], of caches of 8-bit codes (`kv_codes.encode`)
    """
    blocks, offsets = slots // k_cache.shape[2], slots % k_cache.shape[2]
    for tokens, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
        if scales is None:
            cache[blocks, :, offsets] = tokens.to(cache.dtype)
            continue
        codes, scales[blocks, :, offsets] = encode(tokens, cache.dtype)
        cache.view(torch.int8)[blocks, :, offsets] = codes.view(torch.int8)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    tree_mask: Tensor | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Attention of every sequence's new tokens over its whole context, whose keys are already in the cache.

    Sequence b owns query rows query_starts[b]:query_starts[b + 1]; they are the last tokens of a context of
    seq_lens[b] tokens. A row sees the tokens of its context that do not come after it, and of its own step's rows
    those that `tree_mask` names, where there is one. Memory that no row sees may hold anything, NaN included.
    Computed in float64 where q is float64, else in float32; returned in q's shape and dtype.

    q: [num_tokens, num_heads, head_dim]
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]; k_scales, v_scales: as in `store_kv`
    block_tables: [num_seqs, max_blocks]; query_starts: [num_seqs + 1]; seq_lens: [num_seqs]
    scale: multiplies q @ k.T
    window: a row sees itself and the window - 1 positions before it
    soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2, section 2)
    tree_mask: [num_tokens, >= longest query], True where the row sees its sequence's j-th row of this step
    positions: [num_tokens], needed with a window and a tree only: a draft's position is its depth
    sinks: [num_heads], a score per head that takes part in the softmax and carries no value (gpt-oss)
    """
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    starts = query_starts.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        rows = slice(starts[b], starts[b + 1])
        num_queries = rows.stop - rows.start
        k = _in_order(k_cache, k_scales, block_tables[b], length)
        v = _in_order(v_cache, v_scales, block_tables[b], length)
        k, v = (x.to(dtype).repeat_interleave(num_heads // num_kv_heads, dim=0) for x in (k, v))
        sees = visible(
            num_queries,
            length,
            window,
            None if tree_mask is None else tree_mask[rows, :num_queries],
            None if positions is None else positions[rows],
        )
        scores = q[rows].transpose(0, 1).to(dtype) @ k.transpose(1, 2) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores = torch.where(sees, scores, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(dtype)[:, None, None].expand(-1, num_queries, 1)), dim=-1)
        weights = scores.softmax(dim=-1)[..., :length]
        v = v.masked_fill(~sees.any(dim=0)[:, None], 0.0)  # 0 * NaN is NaN
        out[rows] = (weights @ v).transpose(0, 1).to(q.dtype)
    return out


def _in_order(cache: Tensor, scales: Tensor | None, table: Tensor, length: int) -> Tensor:
    """The keys or values of one sequence's context. [num_kv_heads, length, head_dim]"""
    blocks = cache.view(torch.int8)[table].view(cache.dtype) if scales is not None else cache[table]
    if scales is not None:
        blocks = decode(blocks, scales[table])
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length]


def visible(
    num_queries: int,
    length: int,
    window: int | None,
    tree_mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Which token of one sequence's context each of its new rows sees. [num_queries, length], bool.

    tree_mask: [num_queries, num_queries]; positions: [num_queries], both as in `paged_attention`.
    """
    first = length - num_queries
    device = None if tree_mask is None else tree_mask.device
    keys = torch.arange(length, device=device)
    queries = keys[first:]
    sees = keys <= queries[:, None]
    if tree_mask is not None:
        sees = sees.clone()
        sees[:, first:] = tree_mask
        if positions is not None:
            queries = positions.to(keys.dtype)
            keys = torch.cat((keys[:first], queries))
    if window is not None:
        sees = sees & (keys > queries[:, None] - window)
    return sees
