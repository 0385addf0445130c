"""Which program of an attention kernel computes what. Made once per step on the host, shared by all layers.

A sequence with at most `max_split_queries` new tokens goes the split way: its context is cut at fixed places, every
`split_size` tokens, the pieces are attended to in parallel, and a second kernel joins them. Others go the prompt way:
one program per tile of queries reads the whole context. Which way a sequence goes, and where its context is cut,
depends on nothing but the sequence, so that its neighbours never change a bit of its result.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.triton.configs import AttentionConfig

Ints = npt.NDArray[np.int64]

MAX_SPLIT_PROGRAMS = 1024  # some eight per multiprocessor: more programs than that only wait
MAX_ITEMS = 1 << 14  # of a pass: 270 MB at 32 heads of 128, and still thousands of programs


@dataclass(frozen=True, slots=True)
class SplitPass:
    """Some of the split tiles, whose items are in memory together. Those of the next pass take their place."""

    tiles: Tensor  # [num_tiles, 2] int32: sequence, first of its queries
    rows: Tensor  # [num_rows, 2] int32: sequence, query; all queries of the tiles
    item_starts: Tensor  # [num_seqs] int32, first item of each sequence, counted from the pass's first
    num_items: int
    num_programs: int  # per tile and key head; pieces are dealt out to them in turn, so any number will do


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """A *tile* is some neighbouring queries of one sequence with the heads that share a key head.

    An *item* is what one query leaves of one piece of its context: a value and a log-sum-exp per head.
    """

    prompt_tiles: Tensor  # [num_prompt_tiles, 2] int32, those with the longest contexts first
    passes: tuple[SplitPass, ...]  # none where all sequences go the prompt way
    has_joints: bool  # whether any context has more than one piece


def plan_attention(
    query_lens: Ints,
    seq_lens: Ints,
    *,
    group: int,
    config: AttentionConfig,
    device: torch.device,
    num_kv_heads: int,
    max_items: int = MAX_ITEMS,
) -> AttentionPlan:
    """query_lens, seq_lens: [num_seqs], new tokens and all tokens of each sequence; group: query heads per key head

    max_items: of a pass, unless a single tile has more
    """
    assert group <= min(config.decode_rows, config.prompt_rows), f"{group} heads do not fit into a tile"
    is_split = query_lens <= config.max_split_queries
    num_pieces = -(-seq_lens // config.split_size)
    split_lens = np.where(is_split, query_lens, 0)
    prompt_tiles = _tiles(np.where(is_split, 0, query_lens), config.prompt_rows // group)
    contexts = (seq_lens - query_lens)[prompt_tiles[:, 0]] + prompt_tiles[:, 1]
    cuts = _cut(split_lens, num_pieces, size=config.decode_rows // group, max_items=max_items)
    parts = [prompt_tiles[np.argsort(-contexts, kind="stable")]]
    for cut in cuts:
        parts += [cut.tiles, cut.rows, cut.item_starts]
    prompts, *others = _on_device(parts, device)
    most_pieces = int(num_pieces[is_split].max(initial=1))
    passes = [
        SplitPass(
            others[i],
            others[i + 1],
            others[i + 2],
            cut.num_items,
            _num_programs(len(cut.tiles) * num_kv_heads, most_pieces),
        )
        for i, cut in zip(range(0, len(others), 3), cuts, strict=True)
    ]
    return AttentionPlan(prompts, tuple(passes), has_joints=most_pieces > 1)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A pass on the host."""

    tiles: Ints
    rows: Ints
    item_starts: Ints
    num_items: int


def _cut(query_lens: Ints, num_pieces: Ints, *, size: int, max_items: int) -> list[_Cut]:
    """Deals the tiles out to passes, in order. size: queries of a tile"""
    tiles, rows = _tiles(query_lens, size), _tiles(query_lens, 1)
    num_rows = np.minimum(size, query_lens[tiles[:, 0]] - tiles[:, 1])
    row_ends = np.concatenate(([0], np.cumsum(num_rows)))
    item_ends = np.concatenate(([0], np.cumsum(num_rows * num_pieces[tiles[:, 0]])))  # items lie as their queries do
    num_items = query_lens * num_pieces
    item_starts = np.cumsum(num_items) - num_items
    cuts, start = [], 0
    while start < len(tiles):
        first = item_ends[start]
        end = max(start + 1, int(np.searchsorted(item_ends, first + max_items, side="right")) - 1)
        chosen = rows[row_ends[start] : row_ends[end]]
        cuts.append(_Cut(tiles[start:end], chosen, item_starts - first, int(item_ends[end] - first)))
        start = end
    return cuts


def _on_device(parts: list[Ints], device: torch.device) -> list[Tensor]:
    """The parts as int32, in one copy, which to a GPU is only queued: it does not wait for the step that is running.

    Each begins at a multiple of 16 bytes: Triton compiles a kernel once more for addresses that are none.
    """
    starts = list(accumulate((part.size + -part.size % 4 for part in parts), initial=0))
    numbers = np.zeros(starts[-1], dtype=np.int32)
    for start, part in zip(starts, parts, strict=False):
        numbers[start : start + part.size] = part.reshape(-1)
    whole = torch.from_numpy(numbers)
    if device.type != "cpu":
        whole = whole.pin_memory().to(device, non_blocking=True)
    return [whole[start : start + part.size].view(part.shape) for start, part in zip(starts, parts, strict=False)]


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
        starts = firsts.to(torch.int32)
        one = SplitPass(self.split_tiles, self.split_rows, starts, self.num_items, self.num_split_programs)
        return AttentionPlan(self.prompt_tiles, (one,), self.has_joints)


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
        num_split_programs=_num_programs(len(tiles) * num_kv_heads, most_pieces),
        has_joints=most_pieces > 1,
    )


def _num_programs(num_tiles: int, most_pieces: int) -> int:
    """Per tile: as many as keep the chip busy, and no more than there is work for."""
    return min(most_pieces, max(1, -(-MAX_SPLIT_PROGRAMS // num_tiles)))


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
