"""What `TorchAttention` does with a cache of either kind: writes a step's tokens, and lays contexts out in order."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache
from kernels.torch_cpu.batched_attention import gather_codes, gather_context


class Contexts(Protocol):
    """The keys and values of one cache. `places` and `parts` are those of a plan: see `parts_per_block`."""

    def parts_per_block(self, layer: AttentionLayer) -> int | None:
        """As in `torch_plan.Geometry`."""
        ...

    def store(self, k: Tensor, v: Tensor, layer: AttentionLayer, places: Tensor) -> None:
        """k, v: [num_tokens, num_kv_heads, head_dim]"""
        ...

    def gather(
        self, parts: Tensor, blank_rows: Tensor | None, num_contexts: int, layer: AttentionLayer, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """k, v: [num_contexts, num_tokens, head_dim] of dtype, valid until the next call."""
        ...


class DenseContexts:
    """Those of a cache of floats: `parts` and `places` are rows of `KVCache.parts`, and of their tokens."""

    def __init__(self, kv_cache: KVCache) -> None:
        self.kv_cache = kv_cache
        self._parts = [kv_cache.parts(layer) for layer in range(len(kv_cache.v))]
        self._tokens = [parts.view(-1, v.shape[3]) for parts, v in zip(self._parts, kv_cache.v, strict=True)]
        self._scratch = Scratch(kv_cache.device)

    def parts_per_block(self, layer: AttentionLayer) -> int:
        return self.kv_cache.parts_per_block(layer.index)

    def store(self, k: Tensor, v: Tensor, layer: AttentionLayer, places: Tensor) -> None:
        tokens = self._tokens[layer.index]
        tokens.index_copy_(0, places, torch.cat((k, v), dim=1).view(-1, layer.head_dim).to(tokens.dtype))

    def gather(
        self, parts: Tensor, blank_rows: Tensor | None, num_contexts: int, layer: AttentionLayer, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows = self._parts[layer.index]
        scratch = self._scratch.of(parts.shape[0] * rows.shape[1], rows.dtype)
        k, v = gather_context(rows, parts, blank_rows, num_contexts, layer.head_dim, scratch)
        return (k, v) if k.dtype == dtype else (k.to(dtype), v.to(dtype))


class ScaledContexts:
    """Those of a cache of 8-bit codes: `parts` are blocks, and `places` slots."""

    def __init__(self, kv_cache: KVCache) -> None:
        self.kv_cache = kv_cache
        self._bytes, self._numbers = Scratch(kv_cache.device), Scratch(kv_cache.device)

    def parts_per_block(self, layer: AttentionLayer) -> None:
        return None

    def store(self, k: Tensor, v: Tensor, layer: AttentionLayer, places: Tensor) -> None:
        cache = self.kv_cache
        cache.codec.write(cache.memory(layer.index), layer, places, k, v)

    def gather(
        self, parts: Tensor, blank_rows: Tensor | None, num_contexts: int, layer: AttentionLayer, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        cache, num_blocks = self.kv_cache, parts.shape[0]
        memory = cache.memory(layer.index)
        blocks = self._bytes.of(num_blocks * memory.shape[1], torch.uint8).view(num_blocks, -1)
        torch.index_select(memory, 0, parts, out=blocks)
        scales = cache.codec.scales(blocks, layer)
        assert scales is not None
        numbers = self._numbers.of(2 * num_blocks * cache.block_size * layer.num_kv_heads * layer.head_dim, dtype)
        codes = cache.codec.views(blocks, layer)
        return gather_codes(codes, scales, blank_rows, num_contexts, numbers)


class Scratch:
    """Memory that is reused, since the first writes to new memory take longer than what is copied into it."""

    def __init__(self, device: torch.device) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)

    def of(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """[num_elements], not written yet; it shares its memory with what was asked for before."""
        num_bytes = num_elements * dtype.itemsize
        if self._bytes.numel() < num_bytes:
            with torch.inference_mode(False):  # a tensor made in inference mode cannot be written outside of it
                self._bytes = self._bytes.new_empty(num_bytes)
        return self._bytes[:num_bytes].view(dtype)


def make_contexts(kv_cache: KVCache) -> Contexts:
    is_scaled = any(scales is not None for scales in kv_cache.v_scales)
    return ScaledContexts(kv_cache) if is_scaled else DenseContexts(kv_cache)
