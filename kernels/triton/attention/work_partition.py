"""The partition of a step's attention among programs: made once per step, and shared by the layers of one geometry.

A sequence with at most `max_split_queries` new tokens is computed by the split kernel: its context is split every
`split_size` tokens, the splits are attended to in parallel, and the combine kernel reduces their partial results. Any
other is computed by the prompt kernel: one program per tile of queries reads the whole context. Which kernel a sequence
takes, and where its context is split, depends on the sequence alone, so that the rest of the batch never changes a bit
of its result.
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
MAX_PARTIALS = 1 << 14  # of a chunk: 270 MB at 32 heads of 128, and still thousands of programs


@dataclass(frozen=True, slots=True)
class SplitChunk:
    """Tiles whose partials are in the workspace at the same time. Chunks run one after the other in the same memory."""

    tiles: Tensor  # [num_tiles, 2] int32: sequence, first of its queries
    queries: Tensor  # [num_queries, 2] int32: sequence, query; all queries of the tiles
    partial_starts: Tensor  # [num_seqs] int32, first partial of each sequence, counted from the chunk's first
    num_partials: int
    num_programs: int  # per tile and KV head; each takes every num_programs-th split, so any number from 1 is correct


@dataclass(frozen=True, slots=True)
class WorkPartition:
    """The tiles of each kernel, for one step's batch.

    A *tile* is a run of queries of one sequence, with the query heads that share a KV head. A *partial* is the
    attention of one query over one split of its context: a value and a log-sum-exp per head.
    """

    prompt_tiles: Tensor  # [num_prompt_tiles, 2] int32, those with the longest contexts first
    split_chunks: tuple[SplitChunk, ...]  # none where the prompt kernel computes all sequences
    has_partials: bool  # whether any context has more than one split; else the split kernel writes the results


def partition_attention(
    query_lens: Ints,
    seq_lens: Ints,
    *,
    group: int,
    config: AttentionConfig,
    device: torch.device,
    num_kv_heads: int,
    max_partials: int = MAX_PARTIALS,
) -> WorkPartition:
    """The partition for these lengths, computed on the host, and copied to the device in the current stream.

    query_lens, seq_lens: [num_seqs], new tokens and all tokens of each sequence; group: query heads per KV head
    max_partials: of a chunk, unless a single tile has more
    """
    assert group <= min(config.decode_rows, config.prompt_rows), f"{group} heads do not fit into a tile"
    is_split = query_lens <= config.max_split_queries
    num_splits = -(-seq_lens // config.split_size)
    split_query_lens = np.where(is_split, query_lens, 0)
    prompt_tiles = _tiles(np.where(is_split, 0, query_lens), config.prompt_rows // group)
    contexts = (seq_lens - query_lens)[prompt_tiles[:, 0]] + prompt_tiles[:, 1]
    chunks = _chunks(split_query_lens, num_splits, size=config.decode_rows // group, max_partials=max_partials)
    parts = [prompt_tiles[np.argsort(-contexts, kind="stable")]]
    for chunk in chunks:
        parts += [chunk.tiles, chunk.queries, chunk.partial_starts]
    prompts, *others = _on_device(parts, device)
    max_num_splits = int(num_splits[is_split].max(initial=1))
    split_chunks = [
        SplitChunk(
            others[i],
            others[i + 1],
            others[i + 2],
            chunk.num_partials,
            _num_programs(len(chunk.tiles) * num_kv_heads, max_num_splits),
        )
        for i, chunk in zip(range(0, len(others), 3), chunks, strict=True)
    ]
    return WorkPartition(prompts, tuple(split_chunks), has_partials=max_num_splits > 1)


@dataclass(frozen=True, slots=True)
class _HostChunk:
    """A `SplitChunk` before it is copied to the device."""

    tiles: Ints
    queries: Ints
    partial_starts: Ints
    num_partials: int


def _chunks(query_lens: Ints, num_splits: Ints, *, size: int, max_partials: int) -> list[_HostChunk]:
    """The tiles of all sequences, in order, in chunks of at most `max_partials`. size: queries of a tile"""
    tiles, queries = _tiles(query_lens, size), _tiles(query_lens, 1)
    num_queries = np.minimum(size, query_lens[tiles[:, 0]] - tiles[:, 1])
    query_ends = np.concatenate(([0], np.cumsum(num_queries)))
    partial_ends = np.concatenate(([0], np.cumsum(num_queries * num_splits[tiles[:, 0]])))  # in the queries' order
    num_partials = query_lens * num_splits
    partial_starts = np.cumsum(num_partials) - num_partials
    chunks, start = [], 0
    while start < len(tiles):
        first = partial_ends[start]
        end = max(start + 1, int(np.searchsorted(partial_ends, first + max_partials, side="right")) - 1)
        chosen = queries[query_ends[start] : query_ends[end]]
        chunks.append(_HostChunk(tiles[start:end], chosen, partial_starts - first, int(partial_ends[end] - first)))
        start = end
    return chunks


def _on_device(parts: list[Ints], device: torch.device) -> list[Tensor]:
    """The parts as int32 on the device, by one host-to-device copy from pinned memory, queued in the current stream.

    The host does not wait for the step that is running. Each part begins at a multiple of 16 bytes, since Triton
    specialises a kernel on that: for an address that is no such multiple it would compile the kernel once more.
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
class GraphSafePartition:
    """A partition that a CUDA graph can be captured with: it holds for any lengths within its limits.

    The grids are fixed, and the places of the partials are computed on the device from the lengths. It has tiles for as
    many sequences and queries as there may be; the programs of those that are missing return at once. Which program
    takes which split changes no bit of the result, so it gives what `partition_attention` for the same lengths gives.
    """

    split_tiles: Tensor  # as `SplitChunk.tiles`
    split_queries: Tensor  # as `SplitChunk.queries`
    prompt_tiles: Tensor  # [0, 2]: the split kernel computes all sequences
    queries_per_seq: int
    split_size: int
    num_partials: int  # that the workspace must hold
    num_split_programs: int
    has_partials: bool

    def at(self, seq_lens: Tensor) -> WorkPartition:
        """The partition for these lengths, computed by kernels on their device, without a copy to or from the host.

        seq_lens: [num_seqs]; `queries_per_seq` times the splits of all contexts must not exceed `num_partials`.
        """
        splits = (seq_lens + (self.split_size - 1)).div_(self.split_size, rounding_mode="floor")
        firsts = (splits.cumsum(0) - splits).mul_(self.queries_per_seq)
        starts = firsts.to(torch.int32)
        one = SplitChunk(self.split_tiles, self.split_queries, starts, self.num_partials, self.num_split_programs)
        return WorkPartition(self.prompt_tiles, (one,), self.has_partials)


def partition_any_lengths(
    num_seqs: int,
    queries_per_seq: int,
    *,
    max_context: int,
    num_partials: int,
    group: int,
    num_kv_heads: int,
    config: AttentionConfig,
    device: torch.device,
) -> GraphSafePartition:
    """The graph-safe partition for up to `num_seqs` sequences of at most `max_context` tokens, each with up to
    `queries_per_seq` new ones."""
    assert queries_per_seq <= config.max_split_queries, f"{queries_per_seq} new tokens per sequence: too many to split"
    query_lens = np.full(num_seqs, queries_per_seq, dtype=np.int64)
    tiles, queries = _tiles(query_lens, config.decode_rows // group), _tiles(query_lens, 1)
    max_num_splits = -(-max_context // config.split_size)
    return GraphSafePartition(
        split_tiles=torch.from_numpy(tiles.astype(np.int32)).to(device),
        split_queries=torch.from_numpy(queries.astype(np.int32)).to(device),
        prompt_tiles=torch.empty(0, 2, dtype=torch.int32, device=device),
        queries_per_seq=queries_per_seq,
        split_size=config.split_size,
        num_partials=num_partials,
        num_split_programs=_num_programs(len(tiles) * num_kv_heads, max_num_splits),
        has_partials=max_num_splits > 1,
    )


def _num_programs(num_tiles: int, max_num_splits: int) -> int:
    """Programs per tile and KV head: as many as keep the chip busy, and no more than the longest context has splits."""
    return min(max_num_splits, max(1, -(-MAX_SPLIT_PROGRAMS // num_tiles)))


def _tiles(query_lens: Ints, size: int) -> Ints:
    """(sequence, first query) of every run of `size` queries. [num_tiles, 2]"""
    counts = -(-query_lens // size)
    seqs = np.repeat(np.arange(len(counts)), counts)
    firsts = (np.arange(len(seqs)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
    return np.stack((seqs, firsts), axis=1)


class Workspace:
    """Device memory for partials, reused by all layers and steps of one stream.

    It grows as needed. Under a CUDA graph it must be large enough from the start, since a graph keeps its addresses.
    """

    def __init__(self, num_values: int, num_sums: int, device: torch.device) -> None:
        self._values = torch.empty(num_values, dtype=torch.float32, device=device)
        self._sums = torch.empty(num_sums, dtype=torch.float32, device=device)

    def partials(self, num_partials: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Unwritten values [num_partials, num_heads, head_dim] and log-sum-exps [num_partials, num_heads], float32."""
        num_sums = num_partials * num_heads
        if self._values.shape[0] < num_sums * head_dim:
            self._values = self._values.new_empty(num_sums * head_dim * 5 // 4)
        if self._sums.shape[0] < num_sums:
            self._sums = self._sums.new_empty(num_sums * 5 // 4)
        values = self._values[: num_sums * head_dim].view(num_partials, num_heads, head_dim)
        return values, self._sums[:num_sums].view(num_partials, num_heads)
