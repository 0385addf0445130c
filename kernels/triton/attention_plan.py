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
    parts = (split_tiles, split_rows, prompt_tiles, item_starts)
    whole = torch.from_numpy(np.concatenate([part.ravel() for part in parts]).astype(np.int32)).to(device)
    tiles, rows, prompts, starts = whole.split([part.size for part in parts])
    return AttentionPlan(
        split_tiles=tiles.view(-1, 2),
        split_rows=rows.view(-1, 2),
        prompt_tiles=prompts.view(-1, 2),
        item_starts=starts,
        num_items=int(num_items.sum()),
        num_split_programs=min(most_pieces, _programs_per_tile(len(split_tiles) * num_kv_heads)),
        has_joints=most_pieces > 1,
    )


@dataclass(frozen=True, slots=True)
class OpenPlan:
    """A plan for sequences of any lengths, as a CUDA graph needs it: all of it is fixed but where items begin.

    It has tiles for sequences and queries that are not there: their programs end at once. Which program takes which
    piece of a context changes no bit of the result, so it agrees with a plan made for the lengths.
    """

    split_tiles: Tensor
    split_rows: Tensor
    prompt_tiles: Tensor  # none
    rows_per_seq: int
    split_size: int
    num_items: int  # for which there must be memory
    num_split_programs: int
    has_joints: bool

    def at(self, seq_lens: Tensor) -> AttentionPlan:
        """The plan for these lengths, computed where they are: no number goes to the host or comes from it.

        seq_lens: [num_seqs]; `rows_per_seq` items for every piece of a context must be no more than `num_items`.
        """
        pieces = (seq_lens + (self.split_size - 1)).div_(self.split_size, rounding_mode="floor")
        firsts = (pieces.cumsum(0) - pieces).mul_(self.rows_per_seq)
        return AttentionPlan(
            split_tiles=self.split_tiles,
            split_rows=self.split_rows,
            prompt_tiles=self.prompt_tiles,
            item_starts=firsts.to(torch.int32),
            num_items=self.num_items,
            num_split_programs=self.num_split_programs,
            has_joints=self.has_joints,
        )


def plan_any_lengths(
    num_seqs: int,
    rows_per_seq: int,
    *,
    max_context: int,
    num_items: int,
    group: int,
    num_kv_heads: int,
    config: AttentionConfig,
    device: torch.device,
) -> OpenPlan:
    """For up to `num_seqs` sequences of at most `max_context` tokens, each with up to `rows_per_seq` new ones."""
    assert rows_per_seq <= config.max_split_queries, f"{rows_per_seq} new tokens per sequence go the prompt way"
    query_lens = np.full(num_seqs, rows_per_seq, dtype=np.int64)
    tiles, rows = _tiles(query_lens, config.decode_rows // group), _tiles(query_lens, 1)
    most_pieces = -(-max_context // config.split_size)
    return OpenPlan(
        split_tiles=torch.from_numpy(tiles.astype(np.int32)).to(device),
        split_rows=torch.from_numpy(rows.astype(np.int32)).to(device),
        prompt_tiles=torch.empty(0, 2, dtype=torch.int32, device=device),
        rows_per_seq=rows_per_seq,
        split_size=config.split_size,
        num_items=num_items,
        num_split_programs=min(most_pieces, _programs_per_tile(len(tiles) * num_kv_heads)),
        has_joints=most_pieces > 1,
    )


def _programs_per_tile(num_tiles: int) -> int:
    return max(1, -(-MAX_SPLIT_PROGRAMS // max(1, num_tiles)))


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
