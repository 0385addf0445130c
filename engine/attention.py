"""Attention back ends: what reads and writes the paged KV cache of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from engine.attention_plan import AttentionPlan, DecodeGroup, Geometry, PromptChunk, build_plan
from engine.forward_batch import ForwardBatch
from kernels.batched_attention import attend, attend_chunk, gather_context
from kernels.qkv import normalise_and_rotate

if TYPE_CHECKING:
    from engine.kv_cache import KVCache

ATTENTION_BACKENDS = {
    "torch": "engine.attention:TorchAttention",
    "triton": "engine.attention_triton:TritonAttention",
}

Rotation = tuple[Tensor, Tensor]  # cos and sin of every row, as `kernels.rope.rope_factors` makes them


class HeadNorms(NamedTuple):
    """RMSNorm of queries and keys: of each head, or of all heads together, as the sizes of the weights say."""

    q_weight: Tensor | None  # [head_dim] or [num_heads * head_dim]; None, as the other: there is no norm
    k_weight: Tensor | None  # [head_dim] or [num_kv_heads * head_dim]
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What an attention layer asks of its back end."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None  # a query sees itself and the `window - 1` tokens before it
    soft_cap: float | None = None  # scores become soft_cap * tanh(score / soft_cap)


class AttentionBackend(Protocol):
    """Reads and writes one KV cache. One call covers prompt chunks, decoding and (tree) verification."""

    def plan(self, batch: ForwardBatch) -> None:
        """Does once per step what all layers share."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        """Stores k and v into their slots and attends.

        q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]. Returns q's shape.
        """
        ...

    def attend_projection(
        self, qkv: Tensor, rotation: Rotation | None, norms: HeadNorms, layer: AttentionLayer, batch: ForwardBatch
    ) -> Tensor:
        """The same, from what the merged projection gives: normalises queries and keys first, and rotates them.

        qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], queries first
        """
        ...


class TorchAttention:
    """Attention by torch's own operations: batched products for decoding rows, the fused kernel for prompt chunks.

    Scores are computed in the dtype of the queries, which should be one that the device multiplies fast; the cache may
    have another.
    """

    def __init__(self, kv_cache: KVCache) -> None:
        self.kv_cache = kv_cache
        self._blocks = [kv.view(-1, kv.shape[3] * kv.shape[4]) for kv in kv_cache.kv]
        self._tokens = [kv.view(-1, kv.shape[4]) for kv in kv_cache.kv]
        self._plans: dict[Geometry, AttentionPlan] = {}
        self._scratch = torch.empty(0, dtype=kv_cache.dtype)

    def plan(self, batch: ForwardBatch) -> None:
        """Forgets the last step; a plan is made by the first layer of each geometry, since a model has few."""
        self._plans.clear()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        plan = self._plan(q, layer, batch)
        tokens = self._tokens[layer.index]
        tokens.index_copy_(0, plan.store_rows, torch.cat((k, v), dim=1).view(-1, layer.head_dim).to(tokens.dtype))
        if plan.in_order:  # every sequence decodes one token, and all contexts are about as long
            return self._attend_group(q, plan.groups[0], layer).view(q.shape)
        head_rows = q.reshape(-1, layer.head_dim)
        out = torch.empty_like(head_rows)
        for group in plan.groups:
            rows = head_rows.index_select(0, group.query_rows)
            out.index_copy_(0, group.query_rows, self._attend_group(rows, group, layer).view(rows.shape))
        out = out.view(q.shape)
        for chunk in plan.chunks:
            out[chunk.rows] = self._attend_chunk(q[chunk.rows], chunk, layer)
        return out

    def attend_projection(
        self, qkv: Tensor, rotation: Rotation | None, norms: HeadNorms, layer: AttentionLayer, batch: ForwardBatch
    ) -> Tensor:
        return normalise_rotate_and_attend(self, qkv, rotation, norms, layer, batch)

    def _attend_group(self, q: Tensor, group: DecodeGroup, layer: AttentionLayer) -> Tensor:
        k, v = self._gather(group.block_rows, group.blank_rows, group.num_contexts, layer, q.dtype)
        rows = q.reshape(group.num_contexts, -1, layer.head_dim)
        out: Tensor = attend(rows, k, v, group.bias, layer.scale, layer.soft_cap)
        return out

    def _attend_chunk(self, q: Tensor, chunk: PromptChunk, layer: AttentionLayer) -> Tensor:
        k, v = self._gather(chunk.block_rows, None, layer.num_kv_heads, layer, q.dtype)
        out: Tensor = attend_chunk(
            q, k[:, : chunk.num_tokens], v[:, : chunk.num_tokens], chunk.bias, layer.scale, layer.soft_cap
        )
        return out

    def _gather(
        self,
        block_rows: Tensor,
        blank_rows: Tensor | None,
        num_contexts: int,
        layer: AttentionLayer,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """k, v: [num_contexts, num_tokens, head_dim], valid until the next call."""
        blocks = self._blocks[layer.index]
        num_elements = block_rows.shape[0] * blocks.shape[1]
        if self._scratch.numel() < num_elements:
            # kept, as fresh memory costs more to touch than the blocks cost to copy
            with torch.inference_mode(False):  # made in the mode, it could not be written outside of it
                self._scratch = blocks.new_empty(num_elements)
        k, v = gather_context(blocks, block_rows, blank_rows, num_contexts, layer.head_dim, self._scratch)
        return (k, v) if k.dtype == dtype else (k.to(dtype), v.to(dtype))

    def _plan(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> AttentionPlan:
        cache = self.kv_cache
        geometry = Geometry(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            window=layer.window,
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            dtype=q.dtype,
        )
        plan = self._plans.get(geometry)
        if plan is None:
            plan = self._plans[geometry] = build_plan(batch, geometry)
        return plan


def normalise_rotate_and_attend(
    attention: AttentionBackend,
    qkv: Tensor,
    rotation: Rotation | None,
    norms: HeadNorms,
    layer: AttentionLayer,
    batch: ForwardBatch,
) -> Tensor:
    """`attend_projection` in single operations."""
    q, k, v = torch.split(qkv, [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
    cos, sin = rotation or (None, None)
    q, k = normalise_and_rotate(q, k, cos, sin, q_weight=norms.q_weight, k_weight=norms.k_weight, eps=norms.eps)
    return attention(q, k, v, layer, batch)
