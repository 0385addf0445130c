"""Sequences that decode a token per step, and what the device needs to know of them from one step to the next.

Gathering it takes a pass of Python over the sequences. While they stay the same, a step only makes each longer by one,
and every block_size-th a block is added: that is a few vectorised operations, however many they are.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np

from engine.arrays import Ints
from engine.batch.block_tables import WIDTH_STEP, BlockTables
from engine.batch.forward_batch import BatchNumbers
from engine.kv_cache.block_pool import NULL_BLOCK
from engine.kv_cache.manager import KVCacheManager
from engine.types import Scheduled, Sequence


class DecodeRun:
    """A step in which each sequence decodes a token that the host does not know yet, and the steps that follow it.

    seqs, items: of the step, in order; the same objects in every step
    numbers: of the step; its arrays change with each step. The input ids are not known
    """

    def __init__(self, seqs: list[Sequence], *, kv: KVCacheManager, tables: BlockTables) -> None:
        """The sequences have a place for their next token."""
        self.seqs = seqs
        self.items = [Scheduled(seq, 1, 0, samples=True) for seq in seqs]
        self._kv = kv
        # A step is the last one that is launched ahead where its token may be the last of a sequence.
        self._num_left = min(seq.max_num_tokens - seq.num_tokens for seq in seqs) - 2
        self._num_steps = 0
        self._beginning: defaultdict[int, list[int]] = defaultdict(list)
        rows = np.arange(len(seqs))
        positions = np.array([len(seq.token_ids) for seq in seqs], dtype=np.int64)
        block_tables = tables.read(self.items)
        blocks, offsets = np.divmod(positions, kv.block_size)
        for row, offset in enumerate(offsets.tolist()):  # the rows that enter a block after so many steps
            self._beginning[-offset % kv.block_size].append(row)
        self.numbers = BatchNumbers(
            input_ids=np.zeros(len(seqs), dtype=np.int64),
            positions=positions,
            slots=block_tables[rows, blocks] * kv.block_size + offsets,
            query_starts=np.arange(len(seqs) + 1),
            seq_lens=positions + 1,
            block_tables=block_tables,
            logits_rows=rows,
            tree_mask=None,
        )

    @property
    def sampled_positions(self) -> Ints:
        """Where in its sequence each token goes that the step samples."""
        return self.numbers.seq_lens.copy()

    def is_of(self, batch: list[Scheduled]) -> bool:
        """Whether a plan, in which a sequence of this run has one token, is of the same sequences in the same order."""
        return len(batch) == len(self.seqs) and [item.seq for item in batch] == self.seqs

    def advance(self) -> bool:
        """Goes on to the next step. False, and nothing has changed, where a sequence may end before it, or where memory
        is short."""
        numbers, size = self.numbers, self._kv.block_size
        beginning = self._beginning.get((self._num_steps + 1) % size, [])
        if self._num_left <= 0 or not make_room([self.seqs[row] for row in beginning], self._kv):
            return False
        self._num_left -= 1
        self._num_steps += 1
        for array in (numbers.positions, numbers.seq_lens, numbers.slots):
            array += 1
        if beginning:
            self._enter_blocks(beginning)
        return True

    def _enter_blocks(self, rows: list[int]) -> None:
        size, tables, slots = self._kv.block_size, self.numbers.block_tables, self.numbers.slots
        places = [(row, int(self.numbers.positions[row]) // size) for row in rows]
        if max(index for _, index in places) >= tables.shape[1]:
            tables = np.pad(tables, ((0, 0), (0, WIDTH_STEP)))
        for row, index in places:
            seq = self.seqs[row]
            tables[row, index] = seq.block_table[index]
            tables[row, : seq.num_released_blocks[0]] = NULL_BLOCK  # others may own what a window left behind
            slots[row] = seq.block_table[index] * size
        self.numbers = replace(self.numbers, block_tables=tables)


def make_room(seqs: list[Sequence], kv: KVCacheManager) -> bool:
    """Gives each sequence the place for a token more that the scheduler would give it, or none of them any."""
    lacking = [seq for seq in seqs if len(seq.token_ids) >= len(seq.block_table) * kv.block_size]
    if len(lacking) * kv.num_groups > kv.pool.num_free:
        return False
    for seq in lacking:
        kv.allocate(seq, len(seq.token_ids) + 1)
    return True
