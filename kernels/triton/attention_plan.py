"""Which program of an attention kernel computes what. Made once per step on the host, shared by all layers.

A sequence with at most `max_split_queries` new tokens goes the split way: its context is cut at fixed places, every
`split_size` tokens, the pieces are attended to in parallel, and a second kernel joins them. Others go the prompt way:
one program per tile of queries reads the whole context. Which way a sequence goes, and where its context is cut,
depends on nothing but the sequence, so that its neighbours never change a bit of its result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.triton.configs import AttentionConfig

Ints = npt.NDArray[np.int64]

MAX_SPLIT_PROGRAMS = 1024  # some eight per multiprocessor: more programs than that only wait


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """A *tile* is some neighbouring queries of one sequence with the heads that share a key head.

    An *item* is what one query leaves of one piece of its context: a value and a log-sum-exp per head.
    """

    split_tiles: Tensor  # [num_split_tiles, 2] int32: sequence, first of its queries
    split_rows: Tensor  # [num_split_rows, 2] int32: sequence, query; all queries of the split tiles
    prompt_tiles: Tensor  # [num_prompt_tiles, 2] int32, those with the longest contexts first
    item_starts: Tensor  # [num_seqs] int32, first item of each sequence
    num_items: int
    num_split_programs: int  # per tile and key head; pieces are dealt out to them in turn, so any number will do
    has_joints: bool  # whether any context has more than one piece


def plan_attention(
    query_lens: Ints, seq_lens: Ints, *, group: int, config: AttentionConfig, device: torch.device, num_kv_heads: int
) -> AttentionPlan:
    """query_lens, seq_lens: [num_seqs], new tokens and all tokens of each sequence; group: query heads per key head"""
    assert group <= min(config.decode_rows, config.prompt_rows), f"{group} heads do not fit into a tile"
    is_split = query_lens <= config.max_split_queries
    num_pieces = -(-seq_lens // config.split_size)
    num_items = np.where(is_split, query_lens * num_pieces, 0)
    split_tiles = _tiles(np.where(is_split, query_lens, 0), config.decode_rows // group)
    split_rows = _tiles(np.where(is_split, query_lens, 0), 1)
    prompt_tiles = _tiles(np.where(is_split, 0, query_lens), config.prompt_rows // group)
    contexts = (seq_lens - query_lens)[prompt_tiles[:, 0]] + prompt_tiles[:, 1]
    prompt_tiles = prompt_tiles[np.argsort(-contexts, kind="stable")]
    item_starts = np.cumsum(num_items) - num_items
    most_pieces = int(num_pieces[is_split].max(initial=1))
    num_programs = max(1, -(-MAX_SPLIT_PROGRAMS // max(1, len(split_tiles) * num_kv_heads)))
    parts = (split_tiles, split_rows, prompt_tiles, item_starts)
    whole = torch.from_numpy(np.concatenate([part.ravel() for part in parts]).astype(np.int32)).to(device)
    tiles, rows, prompts, starts = whole.split([part.size for part in parts])
    return AttentionPlan(
        split_tiles=tiles.view(-1, 2),
        split_rows=rows.view(-1, 2),
        prompt_tiles=prompts.view(-1, 2),
        item_starts=starts,
        num_items=int(num_items.sum()),
        num_split_programs=min(most_pieces, num_programs),
        has_joints=most_pieces > 1,
    )


def _tiles(query_lens: Ints, size: int) -> Ints:
    """(sequence, first query) of every run of `size` queries. [num_tiles, 2]"""
    counts = -(-query_lens // size)
    seqs = np.repeat(np.arange(len(counts)), counts)
    firsts = (np.arange(len(seqs)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
    return np.stack((seqs, firsts), axis=1)


class Workspace:
    """Memory for items, kept between layers and steps. Give a CUDA graph one that is large enough: it must not grow."""

    def __init__(self, num_values: int, num_sums: int, device: torch.device) -> None:
        self._values = torch.empty(num_values, dtype=torch.float32, device=device)
        self._sums = torch.empty(num_sums, dtype=torch.float32, device=device)

    def items(self, num_items: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Unwritten values [num_items, num_heads, head_dim] and log-sum-exps [num_items, num_heads], float32."""
        num_sums = num_items * num_heads
        if self._values.shape[0] < num_sums * head_dim:
            self._values = self._values.new_empty(num_sums * head_dim * 5 // 4)
        if self._sums.shape[0] < num_sums:
            self._sums = self._sums.new_empty(num_sums * 5 // 4)
        values = self._values[: num_sums * head_dim].view(num_items, num_heads, head_dim)
        return values, self._sums[:num_sums].view(num_items, num_heads)
