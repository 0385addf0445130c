"""Bias and bans on a GPU: a few index writes over the rows of all requests, and a mask for each that is restricted."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Bools, Ints
from engine.batch.transfer import to_device
from engine.sampling.logit_processors import LogitEditsOfSequences
from engine.sampling.rows import SampledRow
from engine.types import Sequence


class DeviceLogitEdits:
    """What `engine.sampling.logit_processors.bias_and_ban` does to one row, done to all rows of a step.

    Masks go to the device once per sequence, and stay while it lives: a byte per token of the vocabulary.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._edits = LogitEditsOfSequences(vocab_size)
        self._masks: WeakKeyDictionary[Sequence, Tensor] = WeakKeyDictionary()

    def apply(self, logits: Tensor, rows: list[SampledRow]) -> None:
        """In place. logits: [num_rows, vocab_size], contiguous. A place may be written twice, with the same value."""
        flat, device = logits.view(-1), logits.device
        edits = [self._edits.of(row.item.seq) for row in rows]
        starts = [row * self._vocab_size for row in range(len(rows))]
        places = np.concatenate([start + one.biased for start, one in zip(starts, edits, strict=True)])
        if len(places):
            values = np.concatenate([one.biases for one in edits]).astype(np.float64)
            flat.index_add_(0, to_device(places, device), to_device(values, device).float())
        for row, one in enumerate(edits):
            if one.forbidden is not None:
                logits[row].masked_fill_(self._mask(rows[row].item.seq, one.forbidden, device), -torch.inf)
        banned: list[Ints] = [start + one.banned(row) for start, one, row in zip(starts, edits, rows, strict=True)]
        places = np.concatenate(banned)
        if len(places):
            flat.index_fill_(0, to_device(places, device), -torch.inf)

    def _mask(self, seq: Sequence, forbidden: Bools, device: torch.device) -> Tensor:
        mask = self._masks.get(seq)
        if mask is None:
            mask = self._masks[seq] = to_device(forbidden, device)
        return mask
