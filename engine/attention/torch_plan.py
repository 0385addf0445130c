"""The indices that the layers of a step share: blocks to gather, rows to score, the tokens that each row sees.

A step's sequences are split in two. Those with few new tokens (decoding, drafts to verify) are grouped by their number
of rows and by their context length, rounded up, and each group is one batched matrix product. Longer prompt chunks
run one by one. The rounding depends on the sequence alone, so that the rest of the batch changes neither the shapes
nor the order of its sums.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Ints
from engine.batch.device_inputs import ForwardBatch

MAX_GROUPED_QUERIES = 16  # rows per sequence up to which batching beats the fused kernel
MIN_CONTEXT = 64  # tokens; shorter contexts are padded to this
MAX_GATHERED = 1 << 20  # elements of keys and values in one group: small enough to be multiplied out of the cache


@dataclass(frozen=True, slots=True)
class Geometry:
    """What these indices depend on besides the batch. Layers that agree in it share them."""

    group: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    parts_per_block: int | None  # as in `KVCache.parts`; None: blocks are gathered as they are
    block_size: int
    dtype: torch.dtype  # of the scores


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with the same number of new tokens and about as long contexts."""

    num_contexts: int  # num_seqs * num_kv_heads
    query_rows: Tensor  # [num_contexts * group * num_queries] rows of q seen as [num_tokens * num_heads, head_dim]
    parts: Tensor  # as in `gather_context`, or blocks
    blank_rows: Tensor | None
    bias: Tensor  # [num_contexts, 1 or group * num_queries, num_tokens]


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """One sequence with many new tokens."""

    rows: slice
    num_tokens: int  # of context gathered and visible
    parts: Tensor
    bias: Tensor | None  # [num_queries, num_tokens]; None is causal over a square


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The indices of one step for the layers of one geometry."""

    places: Tensor  # [num_tokens * 2 * num_kv_heads] rows of `KVCache.parts` seen as [..., head_dim]; or slots
    groups: list[DecodeGroup]
    chunks: list[PromptChunk]
    in_order: bool  # one group whose rows are q's rows in q's order


def build_plan(batch: ForwardBatch, geometry: Geometry) -> AttentionPlan:
    return _Planner(batch, geometry).build()


def rounded_context(num_tokens: int, block_size: int) -> int:
    """The next of 64, 128, 256, 384, 512, 768, 1024, ... as whole blocks: at most half of it is padding from 33 up."""
    size = max(MIN_CONTEXT, 1 << (num_tokens - 1).bit_length())
    if size > 4 * MIN_CONTEXT and num_tokens <= size // 4 * 3:
        size = size // 4 * 3
    return -(-size // block_size) * block_size


class _Planner:
    def __init__(self, batch: ForwardBatch, geometry: Geometry) -> None:
        self.batch, self.geometry = batch, geometry
        self.slots = batch.slots[geometry.group]
        self.device = self.slots.device
        self.starts: Ints = np.array(batch.query_starts_list, dtype=np.int64)
        self.seq_lens: Ints = np.array(batch.seq_lens_list, dtype=np.int64)
        self.num_queries: Ints = np.diff(self.starts)
        self.tables: Ints = batch.block_tables[geometry.group].cpu().numpy()
        first_seen = np.zeros_like(self.seq_lens)
        if geometry.window is not None:
            first_seen = np.maximum(self.seq_lens - self.num_queries - geometry.window + 1, 0)
        self.first_blocks: Ints = first_seen // geometry.block_size
        self.num_seen: Ints = self.seq_lens - self.first_blocks * geometry.block_size

    def build(self) -> AttentionPlan:
        geometry = self.geometry
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        chunks = []
        for b, num_queries in enumerate(self.num_queries.tolist()):
            if num_queries <= MAX_GROUPED_QUERIES:
                by_shape[num_queries, rounded_context(int(self.num_seen[b]), geometry.block_size)].append(b)
            else:
                chunks.append(self._chunk(b))
        groups = []
        for (num_queries, num_tokens), seqs in by_shape.items():
            step = max(1, MAX_GATHERED // (2 * num_tokens * geometry.num_kv_heads * geometry.head_dim))
            for start in range(0, len(seqs), step):
                groups.append(self._group(np.array(seqs[start : start + step]), num_queries, num_tokens))
        in_order = not chunks and len(groups) == 1 and next(iter(by_shape))[0] == 1
        return AttentionPlan(self._places(), groups, chunks, in_order)

    def _places(self) -> Tensor:
        """Where the step's keys and values go."""
        geometry = self.geometry
        if geometry.parts_per_block is None:
            return self.slots
        size, slots = geometry.block_size, self.slots[:, None]
        parts = slots // size * geometry.parts_per_block + self._tensor(self._parts_of_block())
        return (parts * size + slots % size).flatten()

    def _group(self, seqs: Ints, num_queries: int, num_tokens: int) -> DecodeGroup:
        geometry, size = self.geometry, self.geometry.block_size
        num_seqs, num_kv_heads = len(seqs), geometry.num_kv_heads
        group = geometry.num_heads // num_kv_heads
        rows = self.starts[seqs, None] + np.arange(num_queries)
        heads = np.arange(geometry.num_heads).reshape(num_kv_heads, group)
        query_rows = rows[:, None, None, :] * geometry.num_heads + heads[:, :, None]  # [seqs, kv heads, group, queries]

        num_real = -(-self.num_seen[seqs] // size)
        column = np.arange(num_tokens // size)
        # padding repeats the sequence's own first block: its keys are masked, but must be numbers
        column = self.first_blocks[seqs, None] + np.where(column < num_real[:, None], column, 0)
        bias = self._bias(seqs, num_queries, num_tokens)
        if num_queries == 1:
            bias = bias[:, None].expand(-1, num_kv_heads, -1, -1)
        else:
            bias = bias[:, None, None].expand(-1, num_kv_heads, group, -1, -1)
        return DecodeGroup(
            num_contexts=num_seqs * num_kv_heads,
            query_rows=self._tensor(query_rows),
            parts=self._parts(self.tables[seqs[:, None], column]),
            blank_rows=self._blank_rows(seqs, num_tokens),
            bias=bias.reshape(num_seqs * num_kv_heads, -1, num_tokens),
        )

    def _chunk(self, b: int) -> PromptChunk:
        num_queries, num_tokens = int(self.num_queries[b]), int(self.num_seen[b])
        first = int(self.first_blocks[b])
        end = first - (-num_tokens // self.geometry.block_size)
        window = self.geometry.window
        is_square = num_queries == num_tokens and self.batch.tree_mask is None
        is_causal = is_square and (window is None or window >= num_tokens)
        return PromptChunk(
            rows=slice(int(self.starts[b]), int(self.starts[b + 1])),
            num_tokens=num_tokens,
            parts=self._parts(self.tables[b : b + 1, first:end]),
            bias=None if is_causal else self._bias(np.array([b]), num_queries, num_tokens)[0],
        )

    def _parts(self, tables: Ints) -> Tensor:
        """Rows of `KVCache.parts`, keys first, or blocks. tables: [num_seqs, blocks per context], block numbers."""
        if self.geometry.parts_per_block is None:
            return self._tensor(tables)
        heads = self._parts_of_block().reshape(2, 1, -1, 1)
        return self._tensor(heads + tables[None, :, None, :] * self.geometry.parts_per_block)

    def _parts_of_block(self) -> Ints:
        """Offsets of a layer's parts within a block, [2, num_kv_heads]: first those of its keys."""
        return np.arange(2 * self.geometry.num_kv_heads).reshape(-1, 2).T

    def _blank_rows(self, seqs: Ints, num_tokens: int) -> Tensor | None:
        """Rows without a token: the rest of a context's last block, also in its copies if it is the only block."""
        size, num_kv_heads = self.geometry.block_size, self.geometry.num_kv_heads
        num_seen = self.num_seen[seqs, None]
        token = np.arange(num_tokens)
        is_blank = (token >= num_seen) & ((num_seen <= size) | (token < -(-num_seen // size) * size))
        seq, token = np.nonzero(is_blank)
        if not len(seq):
            return None
        contexts = np.arange(2)[:, None] * len(seqs) * num_kv_heads + np.arange(num_kv_heads)
        return self._tensor((contexts[:, :, None] + seq * num_kv_heads) * num_tokens + token)

    def _bias(self, seqs: Ints, num_queries: int, num_tokens: int) -> Tensor:
        """[num_seqs, num_queries, num_tokens], 0 where the row sees the token and -inf where not."""
        window, first_row = self.geometry.window, (self.seq_lens - self.num_queries)[seqs, None]
        keys = (self.first_blocks * self.geometry.block_size)[seqs, None] + np.arange(num_tokens)
        queries = first_row + np.arange(num_queries)
        sees = keys[:, None, :] <= queries[:, :, None]
        if self.batch.tree_mask is not None:
            rows = self.starts[seqs, None] + np.arange(num_queries)
            own = queries - keys[:, :1]  # positions of the step's own tokens among the gathered ones
            tree = self.batch.tree_mask.cpu().numpy()[rows, :num_queries]
            np.put_along_axis(sees, np.broadcast_to(own[:, None, :], tree.shape), tree, axis=2)
            queries = self.batch.positions.cpu().numpy()[rows]
            np.put_along_axis(keys, own, queries, axis=1)
        if window is not None:
            sees &= keys[:, None, :] > queries[:, :, None] - window
        bias = np.where(sees, np.float32(0), np.float32(-np.inf))
        return torch.from_numpy(bias).to(self.device, self.geometry.dtype)

    def _tensor(self, array: Ints) -> Tensor:
        return torch.from_numpy(array.reshape(-1)).to(self.device)
