"""The inputs of CUDA graphs: a padded batch in memory that never moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Ints
from engine.batch.block_tables import WIDTH_STEP
from engine.batch.device_inputs import ForwardBatch, HostStaging, places
from engine.batch.step_inputs import StepInputs

NO_SLOT = -1  # a row whose key and value go nowhere


@dataclass(frozen=True, slots=True)
class GraphSize:
    """A padded batch: so many rows, of so many sequences, of which none has more than `rows_per_seq`."""

    num_rows: int
    num_seqs: int
    rows_per_seq: int


class StaticBatch:
    """One set of inputs for graphs of all sizes, which lie in it one over the other: one is filled at a time.

    Padding comes last: rows that belong to no sequence, and sequences of no rows and no context.
    """

    def __init__(
        self, max_num_rows: int, *, max_num_seqs: int, max_num_blocks: int, num_groups: int = 1, device: torch.device
    ) -> None:
        """max_num_blocks: of one sequence in one group of layers"""
        self._device, self._num_groups = device, num_groups
        max_width = -(-max_num_blocks // WIDTH_STEP) * WIDTH_STEP
        self._landing = torch.zeros(
            places(self._sizes(GraphSize(max_num_rows, max_num_seqs, 1)))[-1], dtype=torch.int64, device=device
        )
        self._tables = torch.zeros(num_groups, max_num_seqs, max_width, dtype=torch.int64, device=device)
        self._tables_of: Tensor | None = None  # what was copied there last
        self._staging = HostStaging(device)
        self._padding = {value: np.full(max_num_rows + 1, value, dtype=np.int64) for value in (0, NO_SLOT)}

    def view(self, size: GraphSize) -> ForwardBatch:
        """The batch as a graph of this size reads it. Its lengths on the host are dummies: kernels read the tensors."""
        sizes = self._sizes(size)
        starts = places(sizes)
        parts = [self._landing[start : start + number] for start, number in zip(starts, sizes, strict=False)]
        input_ids, positions, query_starts, seq_lens, *slots = parts
        return ForwardBatch(
            input_ids=input_ids,
            positions=positions,
            slots=tuple(slots),
            query_starts=query_starts,
            seq_lens=seq_lens,
            block_tables=self._tables[:, : size.num_seqs].unbind(),
            logits_rows=torch.arange(size.num_rows, device=self._device),
            tree_mask=None,
            query_starts_list=[0] * (size.num_seqs + 1),
            seq_lens_list=[0] * size.num_seqs,
        )

    def fill(self, inputs: StepInputs, tables: Tensor, size: GraphSize, tokens: Tensor | None = None) -> None:
        """Copies a step's inputs to where the graph of this size reads them.

        tables: [num_groups, num_seqs, table_width] on the device; the same tensor as the last time holds the same.
        tokens: as in `ModelRunner.forward`
        """
        num_rows, num_seqs = inputs.num_tokens, inputs.num_seqs
        starts = inputs.query_starts
        if size.num_seqs > num_seqs:
            starts = np.concatenate((starts, np.full(size.num_seqs - num_seqs, num_rows, dtype=np.int64)))
        padded = [
            self._pad(inputs.input_ids, size.num_rows, 0),
            self._pad(inputs.positions, size.num_rows, 0),
            starts,
            self._pad(inputs.seq_lens, size.num_seqs, 0),
            *(self._pad(slots, size.num_rows, NO_SLOT) for slots in inputs.slots),
        ]
        self._staging.copy_to(self._landing, self._staging.write(padded))
        if tables is not self._tables_of:
            self._tables_of = None  # until all of them are there
            self._tables[:, :num_seqs, : tables.shape[2]].copy_(tables)
            self._tables_of = tables
        if tokens is not None:
            self._landing[:num_rows].copy_(tokens)

    def _pad(self, part: Ints, size: int, value: int) -> Ints:
        return part if len(part) == size else np.concatenate((part, self._padding[value][: size - len(part)]))

    def _sizes(self, size: GraphSize) -> tuple[int, ...]:
        """Of input ids, positions, query starts, lengths, and the slots of each group."""
        num_rows, num_seqs = size.num_rows, size.num_seqs
        return num_rows, num_rows, num_seqs + 1, num_seqs, *([num_rows] * self._num_groups)
