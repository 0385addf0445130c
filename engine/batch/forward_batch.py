"""The tensors of one forward pass, passed as an argument and never kept in a global.

A step's numbers are gathered on the host (`BatchNumbers`), laid one behind the other in memory that is kept between
steps (`HostStaging`), and go to the device in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch.block_tables import BlockTables
from engine.batch.tree_inputs import tree_mask, tree_positions
from engine.types import Scheduled

Ints = NDArray[np.int64]


@dataclass(slots=True, frozen=True)
class ForwardBatch:
    """One step's rows, sequence after sequence.

    Sequence b owns rows query_starts[b]:query_starts[b + 1]; they are the last tokens of a context of seq_lens[b]
    tokens. `logits_rows` are the rows whose logits are wanted, in order. The batch of a CUDA graph is padded: rows past
    the last query start have slot -1, and sequences past the last have no rows and a context of 0 tokens.
    """

    input_ids: Tensor  # [num_tokens]
    positions: Tensor  # [num_tokens]; a draft's position is its depth, siblings share one
    slots: Tensor  # [num_tokens] block * block_size + offset: where each token's key and value go
    query_starts: Tensor  # [num_seqs + 1]
    seq_lens: Tensor  # [num_seqs] context length, new tokens and drafts included
    block_tables: Tensor  # [num_seqs, max_blocks]; block 0 stands where a sliding window freed one
    logits_rows: Tensor  # [num_logits]
    tree_mask: Tensor | None  # [num_tokens, max_query_len] whether the row sees the sequence's j-th row; None: causal
    query_starts_list: list[int]  # the same numbers on the host, so that a back end need not copy them back
    seq_lens_list: list[int]

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens_list)


@dataclass(slots=True, frozen=True)
class BatchNumbers:
    """The same on the host. `input_ids` holds anything where a token is not known there yet.

    Whoever changes `block_tables` makes another one of these: that is how a device that has them knows.
    """

    input_ids: Ints
    positions: Ints
    slots: Ints
    query_starts: Ints
    seq_lens: Ints
    block_tables: Ints
    logits_rows: Ints
    tree_mask: NDArray[np.bool_] | None

    @property
    def parts(self) -> tuple[Ints, ...]:
        """In the order in which they are laid out; the widest last, so that the places of the others depend on few
        sizes."""
        return (
            self.input_ids, self.positions, self.slots, self.query_starts, self.seq_lens,
            self.logits_rows, self.block_tables,
        )  # fmt: skip


@dataclass(slots=True, frozen=True)
class Ahead:
    """A step that is launched before the host knows its tokens. Every item decodes one.

    numbers: any input ids; tokens: the input ids, [num_items] int64, on the device. A negative one, where no token
    could be chosen, counts as 0
    """

    numbers: BatchNumbers
    tokens: Tensor

    def row(self, index: int) -> Ahead:
        """A step of one of the items alone."""
        numbers, rows = self.numbers, slice(index, index + 1)
        parts = (numbers.input_ids, numbers.positions, numbers.slots, numbers.seq_lens, numbers.block_tables)
        input_ids, positions, slots, seq_lens, block_tables = (part[rows] for part in parts)
        starts, first = np.arange(2), np.zeros(1, dtype=np.int64)
        alone = BatchNumbers(input_ids, positions, slots, starts, seq_lens, block_tables, first, None)
        return Ahead(alone, self.tokens[rows])


def gather_numbers(batch: list[Scheduled], block_size: int, tables: BlockTables) -> BatchNumbers:
    """Reads the scheduled sequences: one pass in Python, the rest vectorised."""
    num_new, num_logits, computed, token_ids = [], [], [], []
    is_tree = False
    for item in batch:
        seq, num_tokens, num_drafts = item.seq, item.num_new_tokens, item.num_drafts
        first = seq.num_computed_tokens
        if num_tokens == 1:
            token_ids.append(seq.token_ids[first])
        else:
            token_ids += seq.token_ids[first : first + num_tokens - num_drafts]
        if num_drafts:
            token_ids += seq.draft_token_ids[:num_drafts]
            is_tree = is_tree or seq.draft_parents[:num_drafts] != _CHAIN[:num_drafts]
        num_new.append(num_tokens)
        computed.append(first)
        num_logits.append(item.num_scored + (1 + num_drafts if item.samples else 0))
    block_tables = tables.read(batch)
    starts = np.array(list(accumulate(num_new, initial=0)), dtype=np.int64)
    seq_lens = np.array(computed, dtype=np.int64) + num_new
    rows = np.arange(len(token_ids))
    if len(rows) == len(batch):  # a row each
        seq_of_row, positions = rows, seq_lens - 1
    else:
        seq_of_row = np.repeat(np.arange(len(batch)), num_new)
        positions = rows + (seq_lens - starts[1:])[seq_of_row]  # where in the context, drafts in order
    blocks, offsets = np.divmod(positions, block_size)
    slots = block_tables[seq_of_row, blocks] * block_size + offsets
    ends = np.array(list(accumulate(num_logits)), dtype=np.int64)
    all_wanted = int(ends[-1]) == len(rows)
    return BatchNumbers(
        input_ids=np.array(token_ids, dtype=np.int64),
        positions=tree_positions(batch, starts, positions) if is_tree else positions,
        slots=slots,
        query_starts=starts,
        seq_lens=seq_lens,
        block_tables=block_tables,
        logits_rows=rows if all_wanted else np.arange(ends[-1]) + np.repeat(starts[1:] - ends, num_logits),
        tree_mask=tree_mask(batch, starts) if is_tree else None,
    )


_CHAIN = list(range(-1, 4096))  # the parents of drafts that follow each other


@lru_cache(maxsize=256)
def places(sizes: tuple[int, ...]) -> list[int]:
    """Where parts of so many numbers begin when they lie one behind the other, and where the last ends.

    At even numbers, 16 bytes: Triton compiles a kernel once more for pointers that are not.
    """
    return list(accumulate((size + size % 2 for size in sizes), initial=0))


class HostStaging:
    """Host memory in which a step's numbers lie one behind the other on their way to the device.

    Pinned where the device is a GPU, and two blocks in turn, so that one is filled while the other is still read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._blocks = [_StagingBlock(device), _StagingBlock(device)]

    def write(self, parts: Listing[Ints]) -> Tensor:
        """All parts in one tensor on the host, where `places` says. Valid until the next write but one. [end] int64"""
        self._blocks.reverse()
        return self._blocks[0].write(parts)

    def copy_to(self, target: Tensor, source: Tensor) -> None:
        """Copies what was just written, without waiting. target: [>= len(source)] int64"""
        target[: len(source)].copy_(source, non_blocking=True)
        self._blocks[0].mark_read()


class _StagingBlock:
    def __init__(self, device: torch.device) -> None:
        self._is_pinned = device.type == "cuda"
        self._memory = torch.empty(0, dtype=torch.int64, device="cpu")
        self._numbers: Ints = self._memory.numpy()
        self._read = torch.cuda.Event() if self._is_pinned else None  # type: ignore[no-untyped-call]

    def write(self, parts: Listing[Ints]) -> Tensor:
        starts = places(tuple([part.size for part in parts]))
        size = starts[-1]
        if self._read is not None:
            self._read.synchronize()  # the device may still be reading what was here before
        if self._memory.numel() < size:
            with torch.inference_mode(False):  # made in the mode, it could not be written outside of it
                self._memory = torch.empty(size * 3 // 2, dtype=torch.int64, device="cpu", pin_memory=self._is_pinned)
            self._numbers = self._memory.numpy()
        for start, part in zip(starts, parts, strict=False):
            self._numbers[start : start + part.size] = part.reshape(-1)
        return self._memory[:size]

    def mark_read(self) -> None:
        if self._read is not None:
            self._read.record()


class BatchBuilder:
    """Makes each step's `ForwardBatch`. On a GPU they share memory that is kept: each is valid until the next."""

    def __init__(self, block_size: int, device: torch.device, tables: BlockTables) -> None:
        self.block_size, self.device = block_size, device
        self._tables = tables
        self._staging = HostStaging(device)
        self._memory = torch.empty(0, dtype=torch.int64, device=device)

    def build(self, batch: list[Scheduled], ahead: Ahead | None = None) -> ForwardBatch:
        """Without `ahead`, the tokens are those of the sequences, and so are their lengths."""
        numbers = gather_numbers(batch, self.block_size, self._tables) if ahead is None else ahead.numbers
        input_ids, positions, slots, query_starts, seq_lens, logits_rows, block_tables = self._on_device(numbers.parts)
        if ahead is not None:
            assert len(ahead.tokens) == len(input_ids), f"{len(ahead.tokens)} tokens for {len(input_ids)} rows"
            input_ids = ahead.tokens.clamp_min(0)
        mask = numbers.tree_mask
        return ForwardBatch(
            input_ids=input_ids,
            positions=positions,
            slots=slots,
            query_starts=query_starts,
            seq_lens=seq_lens,
            block_tables=block_tables,
            logits_rows=logits_rows,
            tree_mask=None if mask is None else torch.from_numpy(mask).to(self.device),
            query_starts_list=numbers.query_starts.tolist(),
            seq_lens_list=numbers.seq_lens.tolist(),
        )

    def _on_device(self, parts: tuple[Ints, ...]) -> list[Tensor]:
        if self.device.type == "cpu":
            return [torch.from_numpy(part) for part in parts]
        numbers = self._staging.write(parts)
        if self._memory.numel() < len(numbers):
            self._memory = torch.empty(len(numbers) * 3 // 2, dtype=torch.int64, device=self.device)
        self._staging.copy_to(self._memory, numbers)
        starts = places(tuple([part.size for part in parts]))
        return [
            self._memory[start : start + part.size].view(part.shape) for start, part in zip(starts, parts, strict=False)
        ]


def build_forward_batch(batch: list[Scheduled], block_size: int, device: torch.device) -> ForwardBatch:
    """One batch in memory of its own."""
    return BatchBuilder(block_size, device, BlockTables()).build(batch)
