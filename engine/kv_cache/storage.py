"""The memory that keys and values live in."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from engine.kv_cache.layer_spec import AttentionLayer


class KVCache:
    """One tensor per layer: [2 (key, value), num_kv_heads, num_blocks, block_size, head_dim].

    Heads come before blocks, so that a gather of whole blocks gives [2, kv heads, sequences, tokens, head_dim] with
    nothing left to transpose: the operand of a batched matrix product. `k[i]` and `v[i]` are layer i's two halves.
    keys_as_columns: the keys of a block are [head_dim, block_size] instead, so that 16 keys are one panel of a product.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        keys_as_columns: bool = False,
    ) -> None:
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        self.kv = [
            _zeros((2, layer.num_kv_heads, num_blocks, block_size, layer.head_dim), dtype, torch.device(device))
            for layer in layers
        ]
        self.keys_as_columns = keys_as_columns
        self.k = [kv[0].view(*kv.shape[1:3], *kv.shape[:2:-1]) if keys_as_columns else kv[0] for kv in self.kv]
        self.v = [kv[1] for kv in self.kv]

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    def move(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """Copies tokens between slots in every layer, as if all were read before any is written.

        src_slots, dst_slots: [num_moved], block * block_size + offset; the destinations are distinct.
        """
        for keys, values in zip(self.k, self.v, strict=True):
            if self.keys_as_columns:
                size = self.block_size
                moved = keys[:, src_slots // size, :, src_slots % size]
                keys[:, dst_slots // size, :, dst_slots % size] = moved
            for tokens in (values,) if self.keys_as_columns else (keys, values):
                rows = tokens.flatten(1, 2)
                rows.index_copy_(1, dst_slots, rows.index_select(1, src_slots))

    @staticmethod
    def bytes_per_token(layers: Sequence[AttentionLayer], dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take in all layers."""
        return sum(2 * layer.num_kv_heads * layer.head_dim for layer in layers) * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because a fresh cache must hold no NaN: a masked key still takes part in a product with 0.

    On the CPU they are pages that the kernel zeroes when they are first used: torch.zeros would write all of them now,
    and numpy.zeros asks for huge ones, of which a single sequence touches most.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
