"""Paged attention for any mix of prompt chunks, decoding and drafts in one call.

Online softmax over tiles of the context (Dao et al. 2022, "FlashAttention"), in powers of two; the query heads that
share a key head lie beside each other in a tile's rows, so that keys and values are read once for all of them
(Ainslie et al. 2023, "GQA"). Short queries split their context over programs (Dao et al. 2023, "Flash-Decoding").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.triton.attention_plan import AttentionPlan, Workspace, plan_attention
from kernels.triton.attention_prompt import prompt_kernel
from kernels.triton.attention_split import joint_kernel, split_kernel
from kernels.triton.compat import next_power_of_2
from kernels.triton.configs import AttentionConfig, attention_config, chip_of


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a caller that runs many layers or steps keeps, instead of having it made for every call."""

    plan: AttentionPlan
    config: AttentionConfig
    workspace: Workspace
    tree_words: Tensor | None = None  # of `pack_tree`


def pack_tree(tree_mask: Tensor) -> Tensor:
    """A tree mask in bits. [num_tokens, cdiv(width, 32)] int32; bit j % 32 of word j // 32 is column j."""
    padded = torch.nn.functional.pad(tree_mask, (0, -tree_mask.shape[1] % 32)).unflatten(1, (-1, 32))
    places = torch.arange(32, dtype=torch.int32, device=tree_mask.device)
    return (padded.to(torch.int32) << places).sum(-1, dtype=torch.int32)


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
    *,
    prepared: Prepared | None = None,
) -> Tensor:
    """Attention of every sequence's new tokens over its whole context, whose keys are already in the cache.

    Sequence b owns query rows query_starts[b]:query_starts[b + 1]; they are the last tokens of a context of
    seq_lens[b] tokens. A row sees the tokens of its context that do not come after it, and of its own step's rows
    those that `tree_mask` names, where there is one. Memory that no row sees may hold anything, NaN included.
    Scores and sums in float32. A sequence's result has the same bits whatever else is in the batch. A sequence of
    length 0 (the padding of a CUDA graph) is skipped.

    q: [num_tokens, num_heads, head_dim]
    k_cache, v_cache: [num_kv_heads, num_blocks, block_size, head_dim]
    block_tables: [num_seqs, max_blocks]; query_starts: [num_seqs + 1]; seq_lens: [num_seqs]
    scale: multiplies q @ k.T
    window: a row sees itself and the window - 1 positions before it
    soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2, section 2)
    tree_mask: [num_tokens, >= longest query], True where the row sees its sequence's j-th row of this step
    positions: [num_tokens], needed with a window and a tree only: a draft's position is its depth
    sinks: [num_heads], a score per head that takes part in the softmax and carries no value (gpt-oss)
    prepared: without it, the lengths are copied to the host and planned for
    """
    _, num_heads, head_dim = q.shape
    num_kv_heads, _, block_size, _ = k_cache.shape
    assert k_cache.shape == v_cache.shape, f"caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
    assert k_cache.shape[3] == head_dim, f"heads of {head_dim} over a cache of {k_cache.shape[3]}"
    assert num_heads % num_kv_heads == 0, f"{num_heads} heads do not share {num_kv_heads} key heads evenly"
    assert query_starts.shape[0] == seq_lens.shape[0] + 1 == block_tables.shape[0] + 1, "one entry per sequence"
    assert q.stride(2) == k_cache.stride(3) == block_tables.stride(1) == 1, "the last dimension is contiguous"
    assert k_cache.stride() == v_cache.stride(), "keys and values lie alike"
    group = num_heads // num_kv_heads
    if prepared is None:
        prepared = _prepare(q, query_starts, seq_lens, group, num_kv_heads)
    plan, config = prepared.plan, prepared.config
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    words = query_starts  # a pointer that is not read
    if tree_mask is not None:
        words = pack_tree(tree_mask) if prepared.tree_words is None else prepared.tree_words
    depths = query_starts if positions is None else positions
    scores = query_starts if sinks is None else sinks
    has_depths = tree_mask is not None and window is not None and positions is not None
    inputs = (q, k_cache, v_cache, out, block_tables, query_starts, seq_lens, words, depths, scores)
    numbers = (scale, window or 0, soft_cap or 0.0)
    strides = (
        *q.stride()[:2],
        *out.stride()[:2],
        *k_cache.stride()[:3],
        block_tables.stride(0),
        words.stride(0),
    )
    features = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(16, next_power_of_2(head_dim)),
        "BLOCK_SIZE": block_size,
        "HAS_WINDOW": window is not None,
        "HAS_SOFT_CAP": soft_cap is not None,
        "HAS_TREE": tree_mask is not None,
        "HAS_DEPTHS": has_depths,
        "HAS_SINKS": sinks is not None,
    }
    if len(plan.prompt_tiles):
        prompt_kernel[(len(plan.prompt_tiles), num_kv_heads)](
            *inputs,
            plan.prompt_tiles,
            *numbers,
            *strides,
            **features,
            NUM_ROWS=config.prompt_rows,
            NUM_KEYS=config.prompt_keys,
            STAGES=config.prompt_stages,
            num_warps=config.prompt_warps,
        )
    if len(plan.split_tiles):
        values, sums = prepared.workspace.items(plan.num_items, num_heads, head_dim)
        split_kernel[(len(plan.split_tiles), num_kv_heads, plan.num_split_programs)](
            *inputs,
            plan.split_tiles,
            plan.item_starts,
            values,
            sums,
            *numbers,
            *strides,
            **features,
            NUM_HEADS=num_heads,
            NUM_ROWS=config.decode_rows,
            NUM_KEYS=config.decode_keys,
            SPLIT_SIZE=config.split_size,
            STAGES=config.decode_stages,
            num_warps=config.decode_warps,
        )
        if plan.has_joints:
            joint_kernel[(len(plan.split_rows), num_heads)](
                values,
                sums,
                out,
                query_starts,
                seq_lens,
                scores,
                plan.split_rows,
                plan.item_starts,
                window or 0,
                *out.stride()[:2],
                NUM_HEADS=num_heads,
                HEAD_DIM=head_dim,
                PADDED_DIM=features["PADDED_DIM"],
                QUERIES_PER_TILE=config.decode_rows // group,
                SPLIT_SIZE=config.split_size,
                PIECES_AT_ONCE=16,
                HAS_WINDOW=window is not None,
                HAS_TREE=tree_mask is not None,
                HAS_SINKS=sinks is not None,
                num_warps=4,
            )
    return out


def _prepare(q: Tensor, query_starts: Tensor, seq_lens: Tensor, group: int, num_kv_heads: int) -> Prepared:
    config = attention_config(q.shape[2], group, q.dtype, chip=chip_of(q.device))
    plan = plan_attention(
        query_starts.diff().cpu().numpy(),
        seq_lens.cpu().numpy(),
        group=group,
        num_kv_heads=num_kv_heads,
        config=config,
        device=q.device,
    )
    return Prepared(plan, config, Workspace(0, 0, q.device))
