"""The attention back end of a CPU: compiled loops over the paged cache, the same for any mix of rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.attention.backend import HeadNorms, Rotation, normalise_rotate_and_attend
from engine.batch.device_inputs import ForwardBatch
from engine.kv_cache.layer_spec import MAX_GROUPS, AttentionLayer
from engine.kv_cache.storage import KVCache
from kernels.numba.core.formats import FORMAT_OF, INT8
from kernels.numba.core.lanes import LANES
from kernels.numba.ops.attention import (
    NUM_TILE_FIELDS,
    SCRATCH_FLOATS,
    SCRATCH_FLOATS_PER_ROW,
    TILE_ROWS,
    copied_floats,
    cut_tiles,
)
from kernels.numba.ops.linear import SCRATCH_BYTES
from kernels.numba.program.program import MAX_BLOCK_TABLES, NUM_STEP_FIELDS, Operation, Step
from kernels.numba.program.team import Program, Team, operation

KINDS = FORMAT_OF | {torch.int8: INT8}  # of what a cache's elements may be


class NumbaAttention:
    """Attention in float32 over a cache of any float type or of int8. A row's result does not depend on what else is in
    the batch.

    The cache keeps its keys as columns (`KVCodec.keys_as_columns`), in blocks of a multiple of 16 tokens; heads
    have a multiple of 16 elements. The memory plan sees to that.
    """

    def __init__(self, kv_cache: KVCache, team: Team) -> None:
        assert kv_cache.codec.keys_as_columns
        assert MAX_GROUPS <= MAX_BLOCK_TABLES
        assert kv_cache.block_size % LANES == 0
        self.kv_cache, self.team = kv_cache, team
        self.step = torch.zeros(NUM_STEP_FIELDS, dtype=torch.int64)
        self._fields = self.step.numpy()
        self._keeps: tuple[object, ...] = ()  # owners of the memory that the step's addresses name
        self._tiles = np.empty((0, NUM_TILE_FIELDS), dtype=np.int64)
        self._rotations: list[Rotation] = []

    def plan(self, batch: ForwardBatch) -> None:
        """Writes the addresses that all layers share into the step: of ids, positions, slots, tables, the tree mask."""
        fields, tables, tree = self._fields, batch.block_tables, batch.tree_mask
        if tree is not None:
            tree = tree.contiguous()
        self._keeps = (batch, tree)
        fields[Step.ROWS] = batch.positions.shape[0]
        fields[Step.INPUT_IDS] = batch.input_ids.data_ptr()
        fields[Step.POSITIONS] = batch.positions.data_ptr()
        fields[Step.NUM_LOGITS] = batch.logits_rows.shape[0]
        fields[Step.LOGITS_ROWS] = batch.logits_rows.data_ptr()
        fields[Step.TREE] = 0 if tree is None else tree.data_ptr()
        fields[Step.TREE_WIDTH] = 0 if tree is None else tree.shape[1]
        for group, (slots, table) in enumerate(zip(batch.slots, tables, strict=True)):
            assert slots.is_contiguous()
            assert table.is_contiguous()
            fields[Step.SLOTS + group] = slots.data_ptr()
            fields[Step.TABLES + group] = table.data_ptr() - tables[0].data_ptr()

    def cut_tiles(self, batch: ForwardBatch, *, group: int) -> None:
        """Cuts the step's rows into the units of attention. group: query heads per KV head"""
        num_rows, table = batch.positions.shape[0], batch.block_tables[0]
        if len(self._tiles) < num_rows:
            tiles = np.empty((2 * num_rows, NUM_TILE_FIELDS), dtype=np.int64)
            self._fields[Step.TILES] = tiles.ctypes.data
            self._tiles = tiles  # last: until then, those that the step names are alive
        self._fields[Step.NUM_TILES] = cut_tiles(
            batch.query_starts.data_ptr(),
            batch.seq_lens.data_ptr(),
            batch.num_seqs,
            tokens_of_tile(group),
            table.data_ptr(),
            table.shape[1] * table.itemsize,
            self._fields[Step.TILES],
        )

    def set_rotations(self, rotations: list[Rotation]) -> None:
        """cos and sin of each rotation of the model, of all positions in steps to come. [positions, width] each."""
        for index, part in enumerate(part for rotation in rotations for part in rotation):
            self._fields[Step.ROTATIONS + index] = part.data_ptr()
        self._rotations = rotations  # last: until then, those that the step names are alive

    def store_and_attend(
        self,
        layer: AttentionLayer,
        qkv: Tensor,
        out: Tensor,
        *,
        rope: tuple[int, int] | None,
        norms: tuple[int, int, float],
    ) -> list[list[int]]:
        """The two operations of a layer's attention: normalise, rotate and store; then attend.

        rope: (index of the rotation, its width); norms: addresses of the heads' norm weights or 0, and their epsilon
        """
        index, width = rope or (0, 0)
        where = self._where(layer)
        heads = (layer.num_heads, layer.num_kv_heads, layer.head_dim)
        store = operation(
            Operation.ROTATE_AND_STORE,
            qkv.data_ptr(),
            *heads,
            *norms[:2],
            index,
            width,
            *where,
            layer.group,
            factors=(norms[2], 0.0),
        )
        attend = operation(
            Operation.ATTEND,
            qkv.data_ptr(),
            out.data_ptr(),
            *heads,
            layer.window or 0,
            *where,
            layer.group,
            factors=(layer.scale, layer.soft_cap or 0.0),
        )
        return [store, attend]

    def _where(self, layer: AttentionLayer) -> tuple[int, ...]:
        """The addresses and strides of a layer's keys and values, as `attend_unit` takes them."""
        cache = self.kv_cache
        keys, values = cache.k[layer.index], cache.v[layer.index]
        strides = [stride * keys.itemsize for stride in keys.stride()[:2]]
        return keys.data_ptr(), values.data_ptr(), KINDS[cache.dtype], cache.block_size, *strides

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        """Attention by itself, for models whose other layers run on torch."""
        qkv = torch.cat((q, k, v), dim=1).float()
        out = torch.empty(q.shape)
        self.cut_tiles(batch, group=layer.num_heads // layer.num_kv_heads)
        operations = self.store_and_attend(layer, qkv, out, rope=None, norms=(0, 0, 0.0))
        self.team.run(Program(operations, self.step))
        return out.to(q.dtype)

    def attend_projection(
        self, qkv: Tensor, rotation: Rotation | None, norms: HeadNorms, layer: AttentionLayer, batch: ForwardBatch
    ) -> Tensor:
        return normalise_rotate_and_attend(self, qkv, rotation, norms, layer, batch)


def tokens_of_tile(group: int) -> int:
    """The most tokens that a unit of attention has, each with `group` query heads."""
    return max(1, int(TILE_ROWS) // group)


def scratch_bytes(layers: list[AttentionLayer], block_size: int) -> int:
    """Bytes of private memory that each thread of the team needs."""

    def of_layer(layer: AttentionLayer) -> int:
        group = layer.num_heads // layer.num_kv_heads
        num_rows = tokens_of_tile(group) * group
        of_rows = num_rows * (2 * layer.head_dim + int(SCRATCH_FLOATS_PER_ROW))
        return 4 * (int(SCRATCH_FLOATS) + of_rows + copied_floats(layer.head_dim, block_size))

    return max(int(SCRATCH_BYTES), *map(of_layer, layers))
