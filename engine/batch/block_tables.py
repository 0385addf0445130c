"""The block tables of running sequences as one array on the host, kept up to date between steps.

A table grows by a block every block_size tokens, so a step need not read it again: at 256 sequences of 4,096 tokens,
turning the lists into arrays took longer than all the rest of a step's preparation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.types import Scheduled, Sequence

Ints = NDArray[np.int64]

WIDTH_STEP = 16  # Triton compiles a kernel once more for strides that are no multiples of it


@dataclass(slots=True)
class _Row:
    """What is known of one sequence."""

    index: int
    source: list[int]  # the sequence's own table: a sequence that starts anew gets another list
    num_blocks: int
    num_released: int


class BlockTables:
    """A row per sequence of the last steps. Reads the sequences and never changes them."""

    def __init__(self) -> None:
        self._tables: Ints = np.zeros((8, WIDTH_STEP), dtype=np.int64)
        self._rows: dict[Sequence, _Row] = {}
        self._free = list(range(8))[::-1]

    def read(self, batch: list[Scheduled]) -> Ints:
        """The tables of the batch, in its order, as wide as the longest or a little wider.

        [num_seqs, max_blocks], 0 past each one's end; max_blocks is a multiple of 16.
        """
        known, indices, width = self._rows, [], 0
        for item in batch:
            seq = item.seq
            table = seq.block_table
            row = known.get(seq)
            if row is None or row.source is not table:
                row = self._start(seq, batch)
            if row.num_blocks != len(table):
                self._extend(row)
            if row.num_released != seq.num_released_blocks[0]:
                row.num_released = seq.num_released_blocks[0]
                self._tables[row.index, : row.num_released] = 0
            width = max(width, row.num_blocks)
            indices.append(row.index)
        width = -(-width // WIDTH_STEP) * WIDTH_STEP
        return self._tables[np.array(indices, dtype=np.int64), :width]

    def _start(self, seq: Sequence, batch: list[Scheduled]) -> _Row:
        row = self._rows.pop(seq, None)
        if row is not None:
            self._free.append(row.index)
        elif not self._free:
            self._forget_all_but(batch)
        index = self._free.pop()
        self._tables[index] = 0
        row = self._rows[seq] = _Row(index, seq.block_table, 0, 0)
        return row

    def _extend(self, row: _Row) -> None:
        num_blocks = len(row.source)
        assert num_blocks > row.num_blocks, "a block table never shrinks"
        if num_blocks > self._tables.shape[1]:
            self._grow(num_columns=WIDTH_STEP * -(-2 * num_blocks // WIDTH_STEP))
        self._tables[row.index, row.num_blocks : num_blocks] = row.source[row.num_blocks :]
        row.num_blocks = num_blocks

    def _forget_all_but(self, batch: list[Scheduled]) -> None:
        """Makes room: the rows of sequences that do not run now, and if those are few, as many again."""
        running = {item.seq for item in batch}
        for seq in [seq for seq in self._rows if seq not in running]:
            self._free.append(self._rows.pop(seq).index)
        num_rows = len(self._tables)
        if len(self._free) < num_rows // 2:
            self._grow(num_rows=2 * num_rows)
            self._free += range(num_rows, 2 * num_rows)

    def _grow(self, *, num_rows: int = 0, num_columns: int = 0) -> None:
        old = self._tables
        shape = (max(num_rows, old.shape[0]), max(num_columns, old.shape[1]))
        self._tables = np.zeros(shape, dtype=np.int64)
        self._tables[: old.shape[0], : old.shape[1]] = old
