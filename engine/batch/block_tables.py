"""Which row of the executor's block tables each sequence has, and what has to change in them before a step.

Tables live where the model runs and are told of changes as (row, column, block): a table grows by a block every
block_size tokens, while all tables of 256 sequences of 32,768 tokens are 4 MB. Host only; never changes a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.arrays import Ints
from engine.batch.step_inputs import NO_ENTRIES, TableChanges
from engine.kv_cache.block_pool import NULL_BLOCK
from engine.types import Scheduled, Sequence

WIDTH_STEP = 16  # Triton compiles a kernel once more for strides that are no multiples of it
_FIRST_ROWS = 8


@dataclass(slots=True)
class _Row:
    """What the tables say of one sequence."""

    index: int  # of its group 0; those of the other groups follow
    source: list[int]  # the sequence's own table of group 0: a sequence that starts anew gets other lists
    num_blocks: int
    num_released: list[int]  # of each group


class BlockTables:
    """A row per sequence of the last steps and group of layers.

    Changes are handed out until `acknowledge` says that a step that had them was launched: setting an entry twice does
    no harm, and a step that failed half-way leaves nobody guessing which it had set.
    """

    def __init__(self, num_groups: int = 1) -> None:
        self.num_groups = num_groups
        self.num_rows, self.num_columns = _FIRST_ROWS * num_groups, WIDTH_STEP
        self._groups = np.arange(num_groups)[:, None]
        self._rows: dict[Sequence, _Row] = {}
        self._free = list(range(0, self.num_rows, num_groups))[::-1]
        self._used: list[int] = [0] * self.num_rows  # columns of a sequence's rows that may hold a block
        self._entries: list[tuple[int, int, int]] = []
        self._array: Ints | None = NO_ENTRIES  # of the entries, once somebody has asked
        self._indices: list[int] = []  # of the rows that were read last, and their array
        self._read: Ints = np.empty((num_groups, 0), dtype=np.int64)

    def read(self, batch: list[Scheduled]) -> tuple[Ints, int]:
        """The rows of the batch's sequences, [num_groups, num_seqs], and how many columns the longest takes, rounded up
        to 16. The same array as the last time where the rows are the same."""
        known, indices, width = self._rows, [], 1
        for item in batch:
            seq = item.seq
            table = seq.block_table
            row = known.get(seq)
            if row is None or row.source is not table:
                row = self._start(seq, batch)
            if row.num_blocks != len(table):
                self._extend(row, seq.block_tables)
            if row.num_released != seq.num_released_blocks:
                self._release(row, seq.num_released_blocks)
            width = max(width, row.num_blocks)
            indices.append(row.index)
        if indices != self._indices:
            self._indices, self._read = indices, np.array(indices, dtype=np.int64) + self._groups
        return self._read, -(-width // WIDTH_STEP) * WIDTH_STEP

    def changes(self) -> TableChanges:
        """All that was not acknowledged yet."""
        if self._array is None:
            self._array = np.array(self._entries, dtype=np.int64)
        return TableChanges(self._array, self.num_rows, self.num_columns)

    def acknowledge(self) -> None:
        """The tables have what `changes` said last."""
        if self._entries:
            self._entries, self._array = [], NO_ENTRIES

    def _start(self, seq: Sequence, batch: list[Scheduled]) -> _Row:
        row = self._rows.pop(seq, None)
        if row is not None:
            self._free.append(row.index)
        elif not self._free:
            self._forget_all_but(batch)
        index = self._free.pop()
        row = self._rows[seq] = _Row(index, seq.block_table, 0, [0] * self.num_groups)
        return row

    def _extend(self, row: _Row, tables: list[list[int]]) -> None:
        num_blocks = len(row.source)
        assert num_blocks > row.num_blocks, "a block table never shrinks"
        if num_blocks > self.num_columns:
            self.num_columns = WIDTH_STEP * -(-2 * num_blocks // WIDTH_STEP)
        for index, table in enumerate(tables, start=row.index):
            blocks = enumerate(table[row.num_blocks :], start=row.num_blocks)
            self._entries += [(index, column, block) for column, block in blocks]
            # what a sequence before had in this row, past this one's end
            self._clear(index, range(num_blocks, self._used[row.index]))
        self._used[row.index] = row.num_blocks = num_blocks
        self._array = None

    def _release(self, row: _Row, num_released: list[int]) -> None:
        for index, (before, now) in enumerate(zip(row.num_released, num_released, strict=True), start=row.index):
            self._clear(index, range(before, now))
        row.num_released = list(num_released)

    def _clear(self, row: int, columns: range) -> None:
        self._entries += [(row, column, NULL_BLOCK) for column in columns]
        self._array = None

    def _forget_all_but(self, batch: list[Scheduled]) -> None:
        """Makes room: the rows of sequences that do not run now, and if those are few, as many again."""
        running = {item.seq for item in batch}
        for seq in [seq for seq in self._rows if seq not in running]:
            self._free.append(self._rows.pop(seq).index)
        if len(self._free) < self.num_rows // self.num_groups // 2:
            self._free += range(self.num_rows, 2 * self.num_rows, self.num_groups)
            self._used += [0] * self.num_rows
            self.num_rows *= 2
