"""The attention back end of a CPU: compiled loops over the paged cache, the same for any mix of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.attention import normalise_rotate_and_attend
from engine.forward_batch import ForwardBatch
from kernels.numba.attention import SCRATCH_FLOATS_PER_ROW, TILE_ROWS
from kernels.numba.elementwise import BFLOAT16, FLOAT16, FLOAT32
from kernels.numba.linear import SCRATCH_BYTES
from kernels.numba.program import NUM_STEP_FIELDS, Operation, Step
from kernels.numba.team import Program, Team, operation

if TYPE_CHECKING:
    from engine.attention import AttentionLayer, HeadNorms, Rotation
    from engine.kv_cache import KVCache

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_LANES = 16


class NumbaAttention:
    """Attention in float32 over a cache of any float type. A row's result does not depend on what else is in the batch.

    The cache must keep its keys as columns (`KVCache(keys_as_columns=True)`). ValueError for head or block sizes that
    are not multiples of 16.
    """

    def __init__(self, kv_cache: KVCache, team: Team) -> None:
        self.kv_cache, self.team = kv_cache, team
        self.step = torch.zeros(NUM_STEP_FIELDS, dtype=torch.int64)
        self._fields = self.step.numpy()
        self._keeps: list[Tensor] = []  # what the step's addresses point to
        self._buffer = torch.empty(0)
        self._rotation_buffers: list[Tensor] = []

    def plan(self, batch: ForwardBatch) -> None:
        """Writes down what all layers share: where rows are stored and which rows attend to what."""
        tree = torch.empty(0) if batch.tree_mask is None else batch.tree_mask.contiguous()
        tables = batch.block_tables.contiguous()
        self._keeps = [batch.input_ids, batch.positions, batch.slots, tree, tables]
        fields = self._fields
        fields[Step.ROWS] = batch.positions.shape[0]
        fields[Step.INPUT_IDS] = batch.input_ids.data_ptr()
        fields[Step.POSITIONS] = batch.positions.data_ptr()
        fields[Step.SLOTS] = batch.slots.data_ptr()
        fields[Step.TREE] = 0 if batch.tree_mask is None else tree.data_ptr()
        fields[Step.TREE_WIDTH] = 0 if batch.tree_mask is None else tree.shape[1]
        self._batch, self._tables = batch, tables

    def cut_tiles(self, group: int) -> None:
        """Cuts the step's rows into tiles of one sequence each, long work first. group: query heads of a key head"""
        starts = np.array(self._batch.query_starts_list, dtype=np.int64)
        num_new = np.diff(starts)
        at_once = tokens_of_tile(group)
        if num_new.max() <= at_once:
            tiles = np.empty((len(num_new), 6), np.int64)
            tiles[:, 0] = tiles[:, 3] = starts[:-1]
            tiles[:, 1] = num_new
            seqs = np.arange(len(num_new))
        else:
            num_tiles = -(-num_new // at_once)
            seqs = np.repeat(np.arange(len(num_new)), num_tiles)
            index = np.arange(len(seqs)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
            tiles = np.empty((len(seqs), 6), np.int64)
            tiles[:, 0] = starts[seqs] + index * at_once
            tiles[:, 1] = np.minimum(at_once, starts[seqs + 1] - tiles[:, 0])
            tiles[:, 3] = starts[seqs]
        tiles[:, 2] = np.array(self._batch.seq_lens_list, dtype=np.int64)[seqs]
        tiles[:, 4] = num_new[seqs]
        tiles[:, 5] = self._tables.data_ptr() + seqs * (self._tables.shape[1] * 8)
        tiles = np.ascontiguousarray(tiles[::-1])
        self._tiles = tiles
        self._fields[Step.NUM_TILES] = len(tiles)
        self._fields[Step.TILES] = tiles.ctypes.data

    def set_rotations(self, rotations: list[tuple[Tensor, Tensor]]) -> None:
        """cos and sin of each rotation of the model, [rows, width] as `kernels.rope.rope_factors` makes them."""
        self._rotation_buffers = [part.contiguous() for rotation in rotations for part in rotation]
        for index, part in enumerate(self._rotation_buffers):
            self._fields[Step.ROTATIONS + index] = part.data_ptr()

    def store_and_attend(
        self,
        layer: AttentionLayer,
        qkv: Tensor,
        out: Tensor,
        *,
        rope: tuple[int, int] | None,
        norms: tuple[int, int, float],
    ) -> list[list[int]]:
        """The two operations of a layer: rotate, normalise and store; attend.

        rope: (index of the rotation, its width); norms: addresses of the heads' norm weights or 0, and their epsilon
        """
        cache = self.kv_cache
        index, width = rope or (0, 0)
        where = (cache.kv[layer.index].data_ptr(), KINDS[cache.dtype], cache.num_blocks, cache.block_size)
        heads = (layer.num_heads, layer.num_kv_heads, layer.head_dim)
        store = operation(
            Operation.ROTATE_AND_STORE,
            qkv.data_ptr(),
            *heads,
            *norms[:2],
            index,
            width,
            *where,
            factors=(norms[2], 0.0),
        )
        attend = operation(
            Operation.ATTEND,
            qkv.data_ptr(),
            out.data_ptr(),
            *heads,
            layer.window or 0,
            *where,
            factors=(layer.scale, layer.soft_cap or 0.0),
        )
        return [store, attend]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        """For models whose layers run on torch."""
        qkv = torch.cat((q, k, v), dim=1).float()
        out = torch.empty(q.shape)
        self.cut_tiles(layer.num_heads // layer.num_kv_heads)
        operations = self.store_and_attend(layer, qkv, out, rope=None, norms=(0, 0, 0.0))
        self.team.run(Program(operations, self.step))
        return out.to(q.dtype)

    def attend_projection(
        self, qkv: Tensor, rotation: Rotation | None, norms: HeadNorms, layer: AttentionLayer, batch: ForwardBatch
    ) -> Tensor:
        return normalise_rotate_and_attend(self, qkv, rotation, norms, layer, batch)


def tokens_of_tile(group: int) -> int:
    return max(1, int(TILE_ROWS) // group)


def scratch_bytes(layers: list[AttentionLayer]) -> int:
    """Memory that each thread needs for itself to run such a model."""

    def of_layer(layer: AttentionLayer) -> int:
        group = layer.num_heads // layer.num_kv_heads
        return tokens_of_tile(group) * group * (2 * layer.head_dim + int(SCRATCH_FLOATS_PER_ROW)) * 4

    return max(int(SCRATCH_BYTES), *map(of_layer, layers))


def why_not(layers: list[AttentionLayer], block_size: int, kv_dtype: torch.dtype) -> str:
    """What keeps this back end from such a cache; empty where nothing does."""
    if kv_dtype not in KINDS:
        return f"a KV cache of {kv_dtype}"
    if block_size % _LANES:
        return f"a block size of {block_size}, no multiple of {_LANES}"
    sizes = [layer.head_dim for layer in layers if layer.head_dim % _LANES]
    return f"a head size of {sizes[0]}, no multiple of {_LANES}" if sizes else ""
