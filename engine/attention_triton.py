"""The attention back end of a GPU. In Triton's interpreter it runs on a CPU too, slowly, for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from engine.forward_batch import ForwardBatch
from kernels.triton.attention import Prepared, pack_tree, paged_attention
from kernels.triton.attention_plan import Workspace, plan_attention
from kernels.triton.configs import attention_config, chip_of
from kernels.triton.store_kv import store_kv

if TYPE_CHECKING:
    from engine.attention import AttentionLayer
    from engine.kv_cache import KVCache

_Geometry = tuple[int, int, int]  # heads, key heads, head size


class TritonAttention:
    """Attention by the kernels of `kernels.triton`. A sequence's result does not depend on what else is in the batch.

    workspace: memory for partial results, which grows as needed where none is given.
    """

    def __init__(self, kv_cache: KVCache, workspace: Workspace | None = None) -> None:
        self.kv_cache = kv_cache
        self.workspace = workspace or Workspace(0, 0, kv_cache.kv[0].device)
        self._prepared: dict[_Geometry, Prepared] = {}
        self._tree_words: Tensor | None = None

    def plan(self, batch: ForwardBatch) -> None:
        """Forgets the last step; a plan is made by the first layer of each geometry, since a model has few."""
        self._prepared.clear()
        self._tree_words = None if batch.tree_mask is None else pack_tree(batch.tree_mask)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        cache = self.kv_cache
        store_kv(k, v, cache.k[layer.index], cache.v[layer.index], batch.slots)
        out: Tensor = paged_attention(
            q,
            cache.k[layer.index],
            cache.v[layer.index],
            batch.block_tables,
            batch.query_starts,
            batch.seq_lens,
            layer.scale,
            window=layer.window,
            soft_cap=layer.soft_cap,
            tree_mask=batch.tree_mask,
            positions=batch.positions,
            prepared=self._prepare(q, layer, batch),
        )
        return out

    def _prepare(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Prepared:
        geometry = (layer.num_heads, layer.num_kv_heads, layer.head_dim)
        prepared = self._prepared.get(geometry)
        if prepared is None:
            group = layer.num_heads // layer.num_kv_heads
            config = attention_config(layer.head_dim, group, q.dtype, chip=chip_of(q.device))
            plan = plan_attention(
                np.diff(np.array(batch.query_starts_list, dtype=np.int64)),
                np.array(batch.seq_lens_list, dtype=np.int64),
                group=group,
                num_kv_heads=layer.num_kv_heads,
                config=config,
                device=q.device,
            )
            prepared = self._prepared[geometry] = Prepared(plan, config, self.workspace, self._tree_words)
        return prepared
