"""The memory that keys and values live in."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from itertools import accumulate
from math import lcm, prod

import torch
from torch import Tensor

from engine.kv_cache.layer_spec import AttentionLayer


class KVCache:
    """All layers' keys and values, block by block: `blocks[b]` is one piece of memory with all that block b holds.

        block:  | layer 0: head 0: keys, values | head 1: keys, values | ... | layer 1: ... |

    A piece, because blocks are what is shared, copied and moved elsewhere; keys beside their values, because attention
    reads both of one head. `k[i]` and `v[i]` are layer i's views: [num_blocks, num_kv_heads, block_size, head_dim].

    keys_as_columns: in memory, the keys of a block and head are [head_dim, block_size], so that 16 keys are one panel
    of a product; the view has the same shape.
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
        self.device = torch.device(device)
        self.keys_as_columns = keys_as_columns
        shapes = [(layer.num_kv_heads, 2, block_size, layer.head_dim) for layer in layers]
        starts = list(accumulate(map(prod, shapes), initial=0))
        part = lcm(*(block_size * layer.head_dim for layer in layers))  # see `parts`
        self.blocks = _zeros((num_blocks, -(-starts[-1] // part) * part), dtype, self.device)
        kv = [
            self.blocks[:, start : start + prod(shape)].view(num_blocks, *shape)
            for start, shape in zip(starts, shapes, strict=False)
        ]
        self.v = [each[:, :, 1] for each in kv]
        self.k = [_as_columns(each[:, :, 0]) if keys_as_columns else each[:, :, 0] for each in kv]

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    def parts(self, layer: int) -> Tensor:
        """A layer's keys and values as rows, one for all that a head has in a block. [rows, block_size * head_dim]

        The keys of head h of block b are row `b * parts_per_block(layer) + 2 * h`, and its values are the next one.
        """
        values = self.v[layer]
        size = values.shape[2] * values.shape[3]
        num_rows = (self.num_blocks - 1) * self.parts_per_block(layer) + 2 * values.shape[1]
        rows: Tensor = values.as_strided((num_rows, size), (size, 1), values.storage_offset() - size)
        return rows

    def parts_per_block(self, layer: int) -> int:
        """From one block to the next in `parts`: those of other layers are counted."""
        return int(self.blocks.shape[1]) // prod(self.v[layer].shape[2:])

    def move(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """Copies tokens between slots in every layer, as if all were read before any is written.

        src_slots, dst_slots: [num_moved], block * block_size + offset; the destinations are distinct.
        """
        size = self.block_size
        for tokens in (*self.k, *self.v):
            tokens[dst_slots // size, :, dst_slots % size] = tokens[src_slots // size, :, src_slots % size]

    @staticmethod
    def bytes_per_token(layers: Sequence[AttentionLayer], dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take in all layers."""
        return sum(2 * layer.num_kv_heads * layer.head_dim for layer in layers) * dtype.itemsize


def _as_columns(keys: Tensor) -> Tensor:
    """keys: [..., block_size, head_dim], whose last two dimensions are one piece. The same memory in another order."""
    size = keys.shape[-2]
    columns: Tensor = keys.as_strided(keys.shape, (*keys.stride()[:-2], 1, size), keys.storage_offset())
    return columns


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because a fresh cache must hold no NaN: a masked key still takes part in a product with 0.

    On the CPU they are pages that the kernel zeroes when they are first used: torch.zeros would write all of them now,
    and numpy.zeros asks for huge ones, of which a single sequence touches most.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, max(prod(shape), 1) * dtype.itemsize), dtype=dtype)[: prod(shape)].view(shape)
