"""Attention by torch's own operations, for a CPU without compiled kernels and for any device that torch has."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.attention.backend import HeadNorms, Rotation, normalise_rotate_and_attend
from engine.attention.torch_plan import AttentionPlan, DecodeGroup, Geometry, PromptChunk, build_plan
from engine.batch.device_inputs import ForwardBatch
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache
from kernels.torch_cpu.batched_attention import attend, attend_chunk, gather_context


class TorchAttention:
    """Attention by torch's own operations: batched products for decoding rows, the fused kernel for prompt chunks.

    Scores are computed in the dtype of the queries, which should be one that the device multiplies fast; the cache may
    have another.
    """

    def __init__(self, kv_cache: KVCache) -> None:
        self.kv_cache = kv_cache
        self._parts = [kv_cache.parts(layer) for layer in range(len(kv_cache.v))]
        self._tokens = [parts.view(-1, v.shape[3]) for parts, v in zip(self._parts, kv_cache.v, strict=True)]
        self._plans: dict[Geometry, AttentionPlan] = {}
        self._scratch = torch.empty(0, dtype=kv_cache.dtype)

    def plan(self, batch: ForwardBatch) -> None:
        """Forgets the last step. Of the layers of one geometry, the first makes the indices of this step for all."""
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
        k, v = self._gather(group.parts, group.blank_rows, group.num_contexts, layer, q.dtype)
        rows = q.reshape(group.num_contexts, -1, layer.head_dim)
        out: Tensor = attend(rows, k, v, group.bias, layer.scale, layer.soft_cap)
        return out

    def _attend_chunk(self, q: Tensor, chunk: PromptChunk, layer: AttentionLayer) -> Tensor:
        k, v = self._gather(chunk.parts, None, layer.num_kv_heads, layer, q.dtype)
        out: Tensor = attend_chunk(
            q, k[:, : chunk.num_tokens], v[:, : chunk.num_tokens], chunk.bias, layer.scale, layer.soft_cap
        )
        return out

    def _gather(
        self,
        parts: Tensor,
        blank_rows: Tensor | None,
        num_contexts: int,
        layer: AttentionLayer,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """k, v: [num_contexts, num_tokens, head_dim], valid until the next call."""
        rows = self._parts[layer.index]
        num_elements = parts.shape[0] * rows.shape[1]
        if self._scratch.numel() < num_elements:
            # reused, since the first writes to new memory take longer than the copy of the parts
            with torch.inference_mode(False):  # a tensor made in inference mode cannot be written outside of it
                self._scratch = rows.new_empty(num_elements)
        k, v = gather_context(rows, parts, blank_rows, num_contexts, layer.head_dim, self._scratch)
        return (k, v) if k.dtype == dtype else (k.to(dtype), v.to(dtype))

    def _plan(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> AttentionPlan:
        cache = self.kv_cache
        geometry = Geometry(
            group=layer.group,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            window=layer.window,
            parts_per_block=cache.parts_per_block(layer.index),
            block_size=cache.block_size,
            dtype=q.dtype,
        )
        plan = self._plans.get(geometry)
        if plan is None:
            plan = self._plans[geometry] = build_plan(batch, geometry)
        return plan
