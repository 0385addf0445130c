"""The inputs of a run of decoding steps: from one to the next they only advance.

Gathering inputs takes a pass of Python over the sequences. While those stay the same and each decodes one token, a step
only makes each longer by one, and every block_size-th adds a block: a few vectorised operations, however many they are.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np

from engine.batch.step_inputs import StepInputs
from engine.kv_cache.manager import KVCacheManager
from engine.runner.step_builder import StepBuilder
from engine.types import Scheduled


class DecodeRun:
    """A step in which each sequence decodes a token that the host does not know yet, and the steps that follow it.

    items: of each step but the first; the same objects in every step. inputs: of the step that was asked for last
    """

    def __init__(self, plan: list[Scheduled], inputs: StepInputs, *, kv: KVCacheManager, builder: StepBuilder) -> None:
        """plan, inputs: of the first step"""
        self.items = [Scheduled(item.seq, 1, 0, True, num_ahead=1, source=row) for row, item in enumerate(plan)]
        self.inputs = inputs
        self._seqs = [item.seq for item in plan]
        self._kv, self._builder = kv, builder
        # Steps that may be launched while no sequence can end by its length before them.
        self._num_left = min(item.seq.max_num_tokens - item.next_position for item in plan) - 1
        self._num_steps = 0
        self._beginning: defaultdict[int, list[int]] = defaultdict(list)
        for row, position in enumerate(inputs.positions.tolist()):  # the rows that enter a block after so many steps
            self._beginning[-position % kv.block_size].append(row)
        self._sources = np.arange(len(plan))

    def is_of(self, batch: list[Scheduled]) -> bool:
        """Whether a plan, in which a sequence of this run has one token, is of the same sequences in the same order."""
        return len(batch) == len(self._seqs) and [item.seq for item in batch] == self._seqs

    def advance(self) -> StepInputs | None:
        """The inputs of the next step, whose tokens are those of the step before. None, and nothing has changed, where
        a sequence may end before it, or where memory is short."""
        size, before = self._kv.block_size, self.inputs
        beginning = self._beginning.get((self._num_steps + 1) % size, [])
        ends = [(self._seqs[row], int(before.positions[row]) + 2) for row in beginning]
        if self._num_left <= 0 or not self._kv.allocate_all(ends):
            return None
        self._num_left -= 1
        self._num_steps += 1
        positions, slots = before.positions + 1, before.slots + 1
        width = before.table_width
        if beginning:
            for row in beginning:
                column = int(positions[row]) // size
                slots[:, row] = [table[column] * size for table in self._seqs[row].block_tables]
            _, num_columns = self._builder.tables.read([self.items[row] for row in beginning])
            width = max(width, num_columns)
        self.inputs = replace(
            before,
            positions=positions,
            slots=slots,
            seq_lens=before.seq_lens + 1,
            table_width=width,
            table_changes=self._builder.tables.changes(),
            sampling=self._builder.sampling.advance(self.items, before.sampling),
            sources=self._sources,
        )
        return self.inputs
