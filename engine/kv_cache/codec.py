"""How keys and values are stored: what `kv_cache.dtype` names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from engine.kv_cache.layer_spec import AttentionLayer
from engine.lazy_import import load_object

KV_CODECS = {
    "float32": "engine.kv_cache.codec:make_dense",
    "bfloat16": "engine.kv_cache.codec:make_dense",
    "float16": "engine.kv_cache.codec:make_dense",
    "int8": "engine.kv_cache.scaled_codec:make_scaled",
    "fp8": "engine.kv_cache.scaled_codec:make_scaled",
}


class KVCodec(Protocol):
    """Stores the keys and values of one layer and block in bytes of their own, whatever else the block holds.

    `memory` is a layer's: uint8 [num_blocks, bytes_per_block], rows contiguous, with other layers' bytes between them.
    `slots`, int64 [num_tokens], are block * block_size + offset.
    """

    @property
    def name(self) -> str:
        """Part of a prefix's key: codecs of one name write the same bytes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored elements."""
        ...

    @property
    def keys_as_columns(self) -> bool:
        """Whether the keys of a block and head lie as [head_dim, block_size]: 16 of them are one panel of a product."""
        ...

    def bytes_per_block(self, layer: AttentionLayer, block_size: int) -> int:
        """Of one layer in one block, all that is needed to read it again."""
        ...

    def alignment(self, layer: AttentionLayer, block_size: int) -> int:
        """Bytes, of which those of a block with all its layers are a multiple."""
        ...

    def views(self, memory: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        """The stored elements of keys and of values. [num_blocks, num_kv_heads, block_size, head_dim] both"""
        ...

    def scales(self, memory: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor] | None:
        """What the elements of a token and head are multiplied by. float32 [num_blocks, num_kv_heads, block_size] both

        None where they are numbers as they are. `stride()[:2]` in bytes is that of `views`.
        """
        ...

    def write(self, memory: Tensor, layer: AttentionLayer, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores tokens, and leaves what others read as it is. The slots are distinct.

        k, v: [num_tokens, num_kv_heads, head_dim]
        """
        ...

    def read(self, memory: Tensor, layer: AttentionLayer, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as attention is to see them, [num_tokens, num_kv_heads, head_dim] both."""
        ...

    def move(self, memory: Tensor, layer: AttentionLayer, sources: Tensor, targets: Tensor) -> None:
        """Copies tokens between slots without a change, as if all were read before any is written. Targets are
        distinct."""
        ...


@dataclass(frozen=True, slots=True)
class DenseCodec:
    """Each element as a float: `[num_kv_heads, 2 (keys, values), block_size, head_dim]` of a layer and block."""

    dtype: torch.dtype
    keys_as_columns: bool = False

    @property
    def name(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{' keys as columns' if self.keys_as_columns else ''}"

    def bytes_per_block(self, layer: AttentionLayer, block_size: int) -> int:
        return 2 * layer.num_kv_heads * self.alignment(layer, block_size)

    def alignment(self, layer: AttentionLayer, block_size: int) -> int:
        """The keys or values of a head: then `KVCache.parts` run through all blocks."""
        return block_size * layer.head_dim * self.dtype.itemsize

    def views(self, memory: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        elements = memory.view(self.dtype)
        num_blocks, num_elements = elements.shape
        block_size = num_elements // (2 * layer.num_kv_heads * layer.head_dim)
        keys, values = elements.view(num_blocks, layer.num_kv_heads, 2, block_size, layer.head_dim).unbind(2)
        if self.keys_as_columns:
            keys = keys.as_strided(keys.shape, (*keys.stride()[:2], 1, block_size), keys.storage_offset())
        return keys, values

    def scales(self, memory: Tensor, layer: AttentionLayer) -> None:
        return None

    def write(self, memory: Tensor, layer: AttentionLayer, slots: Tensor, k: Tensor, v: Tensor) -> None:
        for stored, tokens in zip(self.views(memory, layer), (k, v), strict=True):
            size = stored.shape[2]
            stored[slots // size, :, slots % size] = tokens.to(self.dtype)

    def read(self, memory: Tensor, layer: AttentionLayer, slots: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.views(memory, layer)
        places = (slots // keys.shape[2], slice(None), slots % keys.shape[2])
        return keys[places], values[places]

    def move(self, memory: Tensor, layer: AttentionLayer, sources: Tensor, targets: Tensor) -> None:
        self.write(memory, layer, targets, *self.read(memory, layer, sources))


def make_codec(name: str, *, keys_as_columns: bool = False) -> KVCodec:
    """name: one of KV_CODECS"""
    make = cast(Callable[..., KVCodec], load_object(KV_CODECS[name]))
    return make(name, keys_as_columns=keys_as_columns)


def make_dense(name: str, *, keys_as_columns: bool) -> DenseCodec:
    return DenseCodec(getattr(torch, name), keys_as_columns)
