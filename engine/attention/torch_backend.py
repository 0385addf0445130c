"""Attention by torch's own operations, for a CPU without compiled kernels and for any device that torch has."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.attention.backend import HeadNorms, Rotation, normalise_rotate_and_attend
from engine.attention.torch_contexts import make_contexts
from engine.attention.torch_plan import AttentionPlan, DecodeGroup, Geometry, PromptChunk, build_plan
from engine.batch.device_inputs import ForwardBatch
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache
from kernels.torch_cpu.batched_attention import attend, attend_chunk


class TorchAttention:
    """Attention by torch's own operations: batched products for decoding rows, the fused kernel for prompt chunks.

    Scores are computed in the dtype of the queries, which should be one that the device multiplies fast; the cache may
    have another.
    """

    def __init__(self, kv_cache: KVCache) -> None:
        self.kv_cache = kv_cache
        self._contexts = make_contexts(kv_cache)
        self._plans: dict[Geometry, AttentionPlan] = {}

    def plan(self, batch: ForwardBatch) -> None:
        """Forgets the last step. Of the layers of one geometry, the first makes the indices of this step for all."""
        self._plans.clear()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        plan = self._plan(q, layer, batch)
        self._contexts.store(k, v, layer, plan.places)
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
        k, v = self._contexts.gather(group.parts, group.blank_rows, group.num_contexts, layer, q.dtype)
        rows = q.reshape(group.num_contexts, -1, layer.head_dim)
        out: Tensor = attend(rows, k, v, group.bias, layer.scale, layer.soft_cap)
        return out

    def _attend_chunk(self, q: Tensor, chunk: PromptChunk, layer: AttentionLayer) -> Tensor:
        k, v = self._contexts.gather(chunk.parts, None, layer.num_kv_heads, layer, q.dtype)
        out: Tensor = attend_chunk(
            q, k[:, : chunk.num_tokens], v[:, : chunk.num_tokens], chunk.bias, layer.scale, layer.soft_cap
        )
        return out

    def _plan(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> AttentionPlan:
        cache = self.kv_cache
        geometry = Geometry(
            group=layer.group,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            window=layer.window,
            parts_per_block=self._contexts.parts_per_block(layer),
            block_size=cache.block_size,
            dtype=q.dtype,
        )
        plan = self._plans.get(geometry)
        if plan is None:
            plan = self._plans[geometry] = build_plan(batch, geometry)
        return plan
