"""Attention back ends: what reads and writes the paged KV cache of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from engine.forward_batch import ForwardBatch
from kernels.attention import paged_attention, store_kv

if TYPE_CHECKING:
    from engine.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What an attention layer asks of its back end. `window`: a query sees itself and the `window - 1` tokens before it."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None


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


class TorchAttention:
    """Attention by torch's own operations."""

    def __init__(self, kv_cache: KVCache) -> None:
        self.kv_cache = kv_cache

    def plan(self, batch: ForwardBatch) -> None:
        pass

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        k_cache, v_cache = self.kv_cache.k[layer.index], self.kv_cache.v[layer.index]
        store_kv(k, v, k_cache, v_cache, batch.slots)
        return paged_attention(q, k_cache, v_cache, batch.block_tables, batch.query_starts, batch.seq_lens,
                               layer.scale, layer.window, layer.soft_cap, batch.tree_mask, batch.positions)


ATTENTION_BACKENDS = {"torch": "engine.attention:TorchAttention"}
