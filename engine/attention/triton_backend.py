"""The attention back end of a GPU. In Triton's interpreter it runs on a CPU too, slowly, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.backend import HeadNorms, Rotation
from engine.batch.device_inputs import ForwardBatch
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache
from kernels.triton.attention.paged_attention import Prepared, pack_tree, paged_attention
from kernels.triton.attention.work_partition import (
    GraphSafePartition,
    Workspace,
    partition_any_lengths,
    partition_attention,
)
from kernels.triton.configs import AttentionConfig, attention_config, chip_of
from kernels.triton.layers.qkv import rotate_and_store
from kernels.triton.layers.store_kv import store_kv

_Geometry = tuple[int, int, int]  # query heads, KV heads, head size
ITEM_BYTES = 1 << 28  # of partial results of an eager step; one that has more computes them in chunks


@dataclass(frozen=True, slots=True)
class GraphSpace:
    """What the attention of all CUDA graphs shares. It is never reallocated, since graphs keep the addresses."""

    max_context: int  # tokens
    max_rows_per_seq: int
    split_size: int  # the smallest of any layer's, tokens
    num_items: int  # partial results that the workspace holds, for any of the layers
    workspace: Workspace


def make_graph_space(
    layers: Sequence[AttentionLayer], dtype: torch.dtype, device: torch.device, *, max_context: int, num_bytes: int
) -> GraphSpace:
    """The space for as many partial results as `num_bytes` hold.

    dtype: of the queries; max_context: tokens of the longest context
    """
    configs = [_config(layer, dtype, device) for layer in layers]
    num_sums = max(layer.num_heads for layer in layers)
    num_values = max(layer.num_heads * layer.head_dim for layer in layers)
    num_items = num_bytes // (4 * (num_values + num_sums))
    workspace = Workspace(num_items * num_values, num_items * num_sums, device)
    return GraphSpace(
        max_context=max_context,
        max_rows_per_seq=min(config.max_split_queries for config in configs),
        split_size=min(config.split_size for config in configs),
        num_items=num_items,
        workspace=workspace,
    )


class TritonAttention:
    """Attention by the kernels of `kernels.triton`. A sequence's result does not depend on what else is in the batch.

    All kernels are launched in the current stream by the thread that runs the model. workspace: memory for partial
    results, which grows as needed where none is given. graph_space: needed where steps are captured into CUDA graphs.
    one_path: the split kernel computes prompt chunks too, so that a row's result does not depend on how many rows of
    its sequence the step has.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        workspace: Workspace | None = None,
        *,
        graph_space: GraphSpace | None = None,
        one_path: bool = False,
    ) -> None:
        self.kv_cache = kv_cache
        self.one_path = one_path
        self.workspace = workspace or Workspace(0, 0, kv_cache.device)
        self.graph_space = graph_space
        self._prepared: dict[_Geometry, Prepared] = {}
        self._tree_words: Tensor | None = None
        self._rows_per_seq: int | None = None  # of the graph that the step is for
        self._open_plans: dict[tuple[_Geometry, int, int], GraphSafePartition] = {}  # graphs read their tensors

    def plan(self, batch: ForwardBatch) -> None:
        """Forgets the last step. Of the layers of one geometry, the first partitions this step's work for all."""
        self._prepared.clear()
        self._tree_words = None if batch.tree_mask is None else pack_tree(batch.tree_mask)
        self._rows_per_seq = None

    def plan_any_lengths(self, batch: ForwardBatch, rows_per_seq: int) -> None:
        """As `plan`, for CUDA graphs: the partition is computed on the device, so a replay has its own lengths."""
        assert self.graph_space is not None, "graphs need memory for partial results that is never reallocated"
        self._prepared.clear()
        self._tree_words = None
        self._rows_per_seq = rows_per_seq

    def has_room(self, seq_lens: NDArray[np.int64], rows_per_seq: int) -> bool:
        """Whether contexts of these lengths fit into the graphs' space."""
        space = self.graph_space
        if space is None or rows_per_seq > space.max_rows_per_seq or int(seq_lens.max()) > space.max_context:
            return False
        return rows_per_seq * int((-(-seq_lens // space.split_size)).sum()) <= space.num_items

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        cache, index = self.kv_cache, layer.index
        scales = cache.k_scales[index], cache.v_scales[index]
        store_kv(k, v, cache.k[index], cache.v[index], batch.slots[layer.group], *scales)
        return self._attend(q, layer, batch)

    def attend_projection(
        self, qkv: Tensor, rotation: Rotation | None, norms: HeadNorms, layer: AttentionLayer, batch: ForwardBatch
    ) -> Tensor:
        cache = self.kv_cache
        cos, sin = rotation or (None, None)
        q = rotate_and_store(
            qkv,
            cos,
            sin,
            cache.k[layer.index],
            cache.v[layer.index],
            batch.slots[layer.group],
            num_heads=layer.num_heads,
            q_weight=norms.q_weight,
            k_weight=norms.k_weight,
            eps=norms.eps,
            k_scales=cache.k_scales[layer.index],
            v_scales=cache.v_scales[layer.index],
        )
        return self._attend(q, layer, batch)

    def _attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        cache = self.kv_cache
        out: Tensor = paged_attention(
            q,
            cache.k[layer.index],
            cache.v[layer.index],
            batch.block_tables[layer.group],
            batch.query_starts,
            batch.seq_lens,
            layer.scale,
            window=layer.window,
            soft_cap=layer.soft_cap,
            tree_mask=batch.tree_mask,
            positions=batch.positions,
            k_scales=cache.k_scales[layer.index],
            v_scales=cache.v_scales[layer.index],
            prepared=self._prepare(q, layer, batch),
        )
        return out

    def _prepare(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Prepared:
        geometry = (layer.num_heads, layer.num_kv_heads, layer.head_dim)
        prepared = self._prepared.get(geometry)
        if prepared is None:
            has_codes = self.kv_cache.dtype.itemsize == 1
            config = _config(layer, q.dtype, q.device, has_codes=has_codes)
            if self.one_path:
                config = replace(config, max_split_queries=batch.positions.shape[0])
            if self._rows_per_seq is None or self.graph_space is None:
                plan = partition_attention(
                    np.diff(np.array(batch.query_starts_list, dtype=np.int64)).astype(np.int64, copy=False),
                    np.array(batch.seq_lens_list, dtype=np.int64),
                    group=layer.num_heads // layer.num_kv_heads,
                    num_kv_heads=layer.num_kv_heads,
                    config=config,
                    device=q.device,
                    max_partials=ITEM_BYTES // (4 * layer.num_heads * (layer.head_dim + 1)),
                )
                prepared = Prepared(plan, config, self.workspace, self._tree_words)
            else:
                open_plan = self._open_plan(layer, batch.num_seqs, self._rows_per_seq, config, self.graph_space)
                prepared = Prepared(open_plan.at(batch.seq_lens), config, self.graph_space.workspace)
            self._prepared[geometry] = prepared
        return prepared

    def _open_plan(
        self, layer: AttentionLayer, num_seqs: int, rows_per_seq: int, config: AttentionConfig, space: GraphSpace
    ) -> GraphSafePartition:
        key = (layer.num_heads, layer.num_kv_heads, layer.head_dim), num_seqs, rows_per_seq
        open_plan = self._open_plans.get(key)
        if open_plan is None:
            open_plan = self._open_plans[key] = partition_any_lengths(
                num_seqs,
                rows_per_seq,
                max_context=space.max_context,
                num_partials=space.num_items,
                group=layer.num_heads // layer.num_kv_heads,
                num_kv_heads=layer.num_kv_heads,
                config=config,
                device=self.kv_cache.device,
            )
        return open_plan


def _config(
    layer: AttentionLayer, dtype: torch.dtype, device: torch.device, *, has_codes: bool = False
) -> AttentionConfig:
    group = layer.num_heads // layer.num_kv_heads
    return attention_config(layer.head_dim, group, dtype, chip=chip_of(device), has_codes=has_codes)
