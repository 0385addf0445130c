"""Attention on a CPU as a few large matrix products over gathered keys and values.

Together these functions compute `kernels.reference.attention.paged_attention`. They run once per layer; the indices and
biases that they take are made once per step (`engine.attention.torch_plan`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SCORES = 1 << 23  # scores held at once where a prompt chunk cannot use the fused kernel: 32 MB of float32


def gather_context(
    cache: Tensor, parts: Tensor, blank_rows: Tensor | None, num_contexts: int, head_dim: int, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Copies the keys and values of a group of contexts (one per sequence and KV head) out of their blocks.

    cache: [..., block_size * head_dim], a layer's keys and values, one row for those of a head and block
    parts: [2 * num_contexts * blocks per context] rows of it, first of the keys and then of the values
    blank_rows: rows of the result, seen as [2 * num_contexts * num_tokens, head_dim], that hold no token of the
        context: they are zeroed, since what is masked must still be finite
    out: [>= as many elements as are gathered], the memory of the result
    Returns k, v: [num_contexts, num_tokens, head_dim].
    """
    context = out[: parts.shape[0] * cache.shape[1]].view(-1, cache.shape[1])
    torch.index_select(cache, 0, parts, out=context)
    if blank_rows is not None:
        context.view(-1, head_dim).index_fill_(0, blank_rows, 0.0)
    k, v = context.view(2, num_contexts, -1, head_dim).unbind(0)
    return k, v


def gather_codes(
    codes: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor],
    blank_rows: Tensor | None,
    num_contexts: int,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `gather_context`, of 8-bit codes: what lies in order are their products with the scales.

    codes: those of keys and those of values, [num_blocks, num_kv_heads, block_size, head_dim], the blocks of each
        sequence one after the other; scales: likewise, float32 [num_blocks, num_kv_heads, block_size]
    out: [2 * elements of the keys] of the dtype of the result
    """
    num_blocks, num_kv_heads, block_size, head_dim = codes[0].shape
    num_seqs = num_contexts // num_kv_heads
    contexts = out.view(2, num_seqs, num_kv_heads, num_blocks // num_seqs, block_size, head_dim)
    for elements, factors, context in zip(codes, scales, contexts, strict=True):
        parts = (elements, factors.unsqueeze(-1))
        of_seqs = (x.view(num_seqs, -1, *x.shape[1:]).transpose(1, 2) for x in parts)
        torch.mul(*of_seqs, out=context)
    if blank_rows is not None:
        out.view(-1, head_dim).index_fill_(0, blank_rows, 0.0)
    k, v = out.view(2, num_contexts, -1, head_dim).unbind(0)
    return k, v


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """softmax(cap(q @ k.T * scale) + bias) @ v for many contexts, as batched products.

    q: [num_contexts, num_rows, head_dim]; k, v: [num_contexts, num_tokens, head_dim]
    bias: [num_contexts or 1, num_rows or 1, num_tokens], 0 where a row sees the token and -inf where not
    """
    if soft_cap is None:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    else:
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale / soft_cap).tanh_().mul_(soft_cap).add_(bias)
    return torch.bmm(scores.softmax(dim=-1), v)


def attend_chunk(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, soft_cap: float | None) -> Tensor:
    """One sequence's prompt chunk over its context.

    q: [num_queries, num_heads, head_dim]; k, v: [num_kv_heads, num_tokens, head_dim]
    bias: [num_queries, num_tokens] as in `attend`; None is causal, for a chunk that is the whole context
    Returns [num_queries, num_heads, head_dim].
    """
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_tokens, _ = k.shape
    group = num_heads // num_kv_heads
    grouped = q.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    if soft_cap is None:
        # heads of a group share their keys by a stride of zero, which the fused kernel reads without a copy
        k, v = (x.unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias, is_causal=bias is None, scale=scale)
        return out.permute(2, 0, 1, 3).reshape(q.shape)
    if bias is None:
        bias = q.new_full((num_queries, num_tokens), -torch.inf).triu_(1)
    step = max(1, MAX_SCORES // (num_heads * num_tokens))
    parts = []
    for start in range(0, num_queries, step):
        rows = grouped[:, :, start : start + step].flatten(1, 2)
        part_bias = bias[None, start : start + step].repeat(1, group, 1)
        part = attend(rows, k, v, part_bias, scale, soft_cap)
        parts.append(part.view(num_kv_heads, group, -1, head_dim).permute(2, 0, 1, 3).reshape(-1, num_heads, head_dim))
    return torch.cat(parts)
