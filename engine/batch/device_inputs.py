"""The tensors of one forward pass, passed as an argument and never kept in a global.

A step's inputs are laid one behind the other in memory that is kept between steps (`HostStaging`), and go to the device
in one copy. Block tables stay on the device and are only changed (`DeviceTables`).
"""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.arrays import Ints
from engine.batch.step_inputs import StepInputs, TableChanges


@dataclass(slots=True, frozen=True)
class ForwardBatch:
    """One step's rows, sequence after sequence.

    Sequence b owns rows query_starts[b]:query_starts[b + 1]; they are the last tokens of a context of seq_lens[b]
    tokens. `logits_rows` are the rows whose logits are wanted, in order. The batch of a CUDA graph is padded: rows past
    the last query start have slot -1, and sequences past the last have no rows and a context of 0 tokens.
    """

    input_ids: Tensor  # [num_tokens]
    positions: Tensor  # [num_tokens]; a draft's position is its depth, siblings share one
    slots: tuple[Tensor, ...]  # of each group of layers: [num_tokens] where each token's key and value go
    query_starts: Tensor  # [num_seqs + 1]
    seq_lens: Tensor  # [num_seqs] context length, new tokens and drafts included
    block_tables: tuple[Tensor, ...]  # of each group: [num_seqs, max_blocks]; block 0 where a sliding window freed one
    logits_rows: Tensor  # [num_logits]
    tree_mask: Tensor | None  # [num_tokens, max_query_len] whether the row sees the sequence's j-th row; None: causal
    query_starts_list: list[int]  # the same numbers on the host, so that a back end need not copy them back
    seq_lens_list: list[int]

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens_list)


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


class DeviceTables:
    """The block tables of running sequences, where the model runs. [num_rows, num_columns], 0 where there is no block.

    int64, as indices are; they grow by doubling.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tables = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self._gathered: tuple[Ints, int, Tensor] | None = None  # rows, width and what lay there

    def change(self, changes: TableChanges) -> None:
        """Sets the entries. On a GPU the copy is only queued."""
        num_rows, num_columns = self._tables.shape
        if changes.num_rows > num_rows or changes.num_columns > num_columns:
            self._grow(max(changes.num_rows, num_rows), max(changes.num_columns, num_columns))
        if len(changes.entries):
            self._gathered = None
            entries = changes.entries
            if self.device.type == "cpu":
                self._tables.numpy()[entries[:, 0], entries[:, 1]] = entries[:, 2]
                return
            if len(entries) > 1:  # of two changes of an entry the last one counts, on a device too
                entries = _last_of_each(entries, self._tables.shape[1])
            rows, columns, blocks = to_device(np.ascontiguousarray(entries.T), self.device)
            self._tables.view(-1).index_copy_(0, rows * self._tables.shape[1] + columns, blocks)

    def read(self, inputs: StepInputs) -> Tensor:
        """The tables of the step's sequences in its order. May be shared between steps.

        [num_groups, num_seqs, table_width]
        """
        rows, width = inputs.table_rows, inputs.table_width
        if self._gathered is not None and self._gathered[0] is rows and self._gathered[1] == width:
            return self._gathered[2]
        if self.device.type == "cpu":
            found = torch.from_numpy(self._tables.numpy()[rows, :width])
        else:
            found = self._tables[:, :width].index_select(0, to_device(rows.reshape(-1), self.device))
            found = found.view(*rows.shape, width)
        self._gathered = (rows, width, found)
        return found

    def _grow(self, num_rows: int, num_columns: int) -> None:
        old = self._tables
        with torch.inference_mode(False):  # made in the mode, it could not be written outside of it
            self._tables = torch.zeros(num_rows, num_columns, dtype=torch.int64, device=self.device)
        self._tables[: old.shape[0], : old.shape[1]] = old
        self._gathered = None


def _last_of_each(entries: Ints, num_columns: int) -> Ints:
    places = (entries[:, 0] * num_columns + entries[:, 1])[::-1]
    _, last = np.unique(places, return_index=True)
    kept: Ints = entries[::-1][last]
    return kept


class BatchBuilder:
    """Makes each step's `ForwardBatch`. On a GPU they share memory that is kept: each is valid until the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tables = DeviceTables(device)
        self._staging = HostStaging(device)
        self._memory = torch.empty(0, dtype=torch.int64, device=device)
        self._tables_of_groups: tuple[Tensor, tuple[Tensor, ...]] = self._memory, ()

    def build(self, inputs: StepInputs, tokens: Tensor | None = None) -> ForwardBatch:
        """tokens: [num_tokens] the input ids, on the device, where the host does not know all of them"""
        self.tables.change(inputs.table_changes)
        parts = (
            inputs.input_ids, inputs.positions, inputs.query_starts, inputs.seq_lens, inputs.logits_rows, *inputs.slots,
        )  # fmt: skip
        input_ids, positions, query_starts, seq_lens, logits_rows, *slots = self._on_device(parts)
        mask = inputs.tree_mask
        return ForwardBatch(
            input_ids=input_ids if tokens is None else tokens,
            positions=positions,
            slots=tuple(slots),
            query_starts=query_starts,
            seq_lens=seq_lens,
            block_tables=self._by_group(self.tables.read(inputs)),
            logits_rows=logits_rows,
            tree_mask=None if mask is None else torch.from_numpy(mask).to(self.device),
            query_starts_list=inputs.query_starts.tolist(),
            seq_lens_list=inputs.seq_lens.tolist(),
        )

    def _by_group(self, tables: Tensor) -> tuple[Tensor, ...]:
        """Each group's tables. The same tensors as the last time where `tables` is the same."""
        if tables is not self._tables_of_groups[0]:
            self._tables_of_groups = tables, tables.unbind()
        return self._tables_of_groups[1]

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


def to_device(
    array: npt.NDArray[np.int64] | npt.NDArray[np.float64] | npt.NDArray[np.bool_], device: torch.device
) -> Tensor:
    """The array as a tensor. To a GPU the copy is only queued: it waits for nobody. The array may change afterwards."""
    if device.type == "cpu":
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
