"""Keys and values in 8 bits: half the bytes of float16, and a scale for each token and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kv_cache.layer_spec import AttentionLayer
from kernels.reference.kv_codes import decode, encode

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
ALIGNMENT = 64  # bytes: a block begins with a cache line, and so do its parts where they have a multiple of 16 tokens


@dataclass(frozen=True, slots=True)
class ScaledCodec:
    """Each element as a code, times a float32 scale of its token and head (`kernels.reference.kv_codes`).

    A layer and block are `[num_kv_heads, 2 (keys, values)]` parts of:

        | block_size * head_dim codes | block_size scales |

    So a part's scales are what a loop over its codes comes to next, and of 16 tokens they are one cache line. Heads
    have a multiple of 4 elements.
    """

    dtype: torch.dtype
    keys_as_columns: bool = False

    @property
    def name(self) -> str:
        name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return f"{name} by token and head{' keys as columns' if self.keys_as_columns else ''}"

    def bytes_per_block(self, layer: AttentionLayer, block_size: int) -> int:
        return 2 * layer.num_kv_heads * _part_bytes(layer, block_size)

    def alignment(self, layer: AttentionLayer, block_size: int) -> int:
        return ALIGNMENT

    def views(self, memory: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        keys, values = self._codes(memory, layer)
        return keys.view(self.dtype), values.view(self.dtype)

    def scales(self, memory: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        block_size = _block_size(memory, layer)
        floats, part = memory.view(torch.float32), _part_bytes(layer, block_size) // 4
        shape = (len(memory), layer.num_kv_heads, block_size)
        first = floats.storage_offset() + block_size * layer.head_dim // 4
        keys, values = (floats.as_strided(shape, (floats.stride(0), 2 * part, 1), first + i * part) for i in (0, 1))
        return keys, values

    def write(self, memory: Tensor, layer: AttentionLayer, slots: Tensor, k: Tensor, v: Tensor) -> None:
        encoded = (encode(tokens, self.dtype) for tokens in (k, v))
        self._put(memory, layer, slots, [(codes.view(torch.int8), scales) for codes, scales in encoded])

    def read(self, memory: Tensor, layer: AttentionLayer, slots: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (decode(codes.view(self.dtype), scales) for codes, scales in self._take(memory, layer, slots))
        return keys, values

    def move(self, memory: Tensor, layer: AttentionLayer, sources: Tensor, targets: Tensor) -> None:
        self._put(memory, layer, targets, self._take(memory, layer, sources))

    def _codes(self, memory: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        """Of keys and of values, whatever they stand for: int8, which torch can index. As `views`."""
        block_size = _block_size(memory, layer)
        part = _part_bytes(layer, block_size)
        shape = (len(memory), layer.num_kv_heads, block_size, layer.head_dim)
        rows, columns = (layer.head_dim, 1), (1, block_size)
        keys, values = (
            memory.view(torch.int8).as_strided(
                shape, (memory.stride(0), 2 * part, *order), memory.storage_offset() + i * part
            )
            for i, order in enumerate((columns if self.keys_as_columns else rows, rows))
        )
        return keys, values

    def _take(self, memory: Tensor, layer: AttentionLayer, slots: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Copies of the codes and scales of tokens: of their keys, and of their values."""
        size = _block_size(memory, layer)
        places = (slots // size, slice(None), slots % size)
        pairs = zip(self._codes(memory, layer), self.scales(memory, layer), strict=True)
        return [(codes[places], scales[places]) for codes, scales in pairs]

    def _put(self, memory: Tensor, layer: AttentionLayer, slots: Tensor, tokens: list[tuple[Tensor, Tensor]]) -> None:
        size = _block_size(memory, layer)
        places = (slots // size, slice(None), slots % size)
        pairs = zip(self._codes(memory, layer), self.scales(memory, layer), strict=True)
        for (codes, scales), (new_codes, new_scales) in zip(pairs, tokens, strict=True):
            codes[places], scales[places] = new_codes, new_scales


def make_scaled(name: str, *, keys_as_columns: bool) -> ScaledCodec:
    return ScaledCodec(DTYPES[name], keys_as_columns)


def _part_bytes(layer: AttentionLayer, block_size: int) -> int:
    return block_size * (layer.head_dim + 4)


def _block_size(memory: Tensor, layer: AttentionLayer) -> int:
    """The tokens of a block, which takes so many bytes."""
    return int(memory.shape[1]) // (2 * layer.num_kv_heads * (layer.head_dim + 4))
