"""The memory that keys and values live in."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Sequence
from math import lcm

import torch
from torch import Tensor

from engine.kv_cache.codec import KVCodec
from engine.kv_cache.layer_spec import AttentionLayer


class KVCache:
    """All layers' keys and values, block by block: `blocks[b]` is one piece of memory with all that block b holds.

        block:  | layer 0: head 0: keys, values | head 1: keys, values | ... | layer 1: ... |

    Of which layers, says the group that has taken the block (`AttentionLayer.group`): those of another group lie in the
    same places, and are read by its own block tables.
    A piece, because blocks are what is shared, copied and moved elsewhere; keys beside their values, because attention
    reads both of one head. What a layer's bytes in a block mean is the codec's. `k[i]` and `v[i]` are layer i's stored
    elements, [num_blocks, num_kv_heads, block_size, head_dim]; only their strides say how they lie. `k_scales[i]` and
    `v_scales[i]` are what these are multiplied by, [num_blocks, num_kv_heads, block_size], or None.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        *,
        num_blocks: int,
        block_size: int,
        codec: KVCodec,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_blocks, self.block_size, self.codec = num_blocks, block_size, codec
        self.device = torch.device(device)
        self.blocks = _zeros(num_blocks, bytes_per_block(layers, block_size, codec), self.device)
        self._layers = list(layers)
        self._memory = [
            self.blocks[:, start : start + codec.bytes_per_block(layer, block_size)]
            for start, layer in zip(_starts(layers, block_size, codec), layers, strict=True)
        ]
        views = [codec.views(memory, layer) for memory, layer in zip(self._memory, layers, strict=True)]
        self.k, self.v = [keys for keys, _ in views], [values for _, values in views]
        scales = [
            codec.scales(memory, layer) or (None, None) for memory, layer in zip(self._memory, layers, strict=True)
        ]
        self.k_scales, self.v_scales = [keys for keys, _ in scales], [values for _, values in scales]

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def dtype(self) -> torch.dtype:
        return self.codec.dtype

    def parts(self, layer: int) -> Tensor:
        """A layer's stored elements as rows, one for all keys or values that a head has in a block.

        [rows, block_size * head_dim]; the keys of head h of block b are row `b * parts_per_block(layer) + 2 * h`, and
        its values are the next one. Of codecs without scales only, between which they would lie.
        """
        assert self.v_scales[layer] is None
        values = self.v[layer]
        size = values.shape[2] * values.shape[3]
        num_rows = (self.num_blocks - 1) * self.parts_per_block(layer) + 2 * values.shape[1]
        rows: Tensor = values.as_strided((num_rows, size), (size, 1), values.storage_offset() - size)
        return rows

    def parts_per_block(self, layer: int) -> int:
        """From one block to the next in `parts`: those of other layers are counted."""
        values = self.v[layer]
        return int(self.blocks.shape[1]) // (values.shape[2] * values.shape[3] * values.itemsize)

    def memory(self, layer: int) -> Tensor:
        """A layer's bytes, as its codec takes them. uint8 [num_blocks, `KVCodec.bytes_per_block`]"""
        return self._memory[layer]

    def move(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """Copies tokens between slots in every layer, as if all were read before any is written.

        src_slots, dst_slots: [num_groups, num_moved], block * block_size + offset; the destinations are distinct.
        """
        sources, targets = src_slots.unbind(), dst_slots.unbind()
        for memory, layer in zip(self._memory, self._layers, strict=True):
            self.codec.move(memory, layer, sources[layer.group], targets[layer.group])


def bytes_per_block(layers: Sequence[AttentionLayer], block_size: int, codec: KVCodec) -> int:
    """Bytes of a block with all layers of a group, the largest one.

    Rounded up to what each layer's codec asks for (`KVCodec.alignment`).
    """
    starts = _starts(layers, block_size, codec)
    ends = [start + codec.bytes_per_block(layer, block_size) for start, layer in zip(starts, layers, strict=True)]
    unit = lcm(*(codec.alignment(layer, block_size) for layer in layers))
    return -(-max(ends, default=0) // unit) * unit


def _starts(layers: Sequence[AttentionLayer], block_size: int, codec: KVCodec) -> list[int]:
    """Where each layer's bytes begin in a block of its group."""
    ends: defaultdict[int, int] = defaultdict(int)
    starts = []
    for layer in layers:
        starts.append(ends[layer.group])
        ends[layer.group] += codec.bytes_per_block(layer, block_size)
    return starts


def _zeros(num_blocks: int, num_bytes: int, device: torch.device) -> Tensor:
    """Zeros, because a fresh cache must hold no NaN: a masked key still takes part in a product with 0.

    On the CPU they are pages that the kernel zeroes when they are first used: torch.zeros would write all of them now,
    and numpy.zeros asks for huge ones, of which a single sequence touches most.
    """
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros((num_blocks, num_bytes), dtype=torch.uint8, device=device)
    return torch.frombuffer(mmap.mmap(-1, num_blocks * num_bytes), dtype=torch.uint8).view(num_blocks, num_bytes)
