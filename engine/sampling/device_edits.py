"""Bias and bans on a GPU: a few index writes over the rows of all requests, and a mask for each that is restricted."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Bools, Ints
from engine.batch.device_inputs import to_device
from engine.batch.step_inputs import RowEdits, TokenEdits


class DeviceEdits:
    """What `engine.sampling.logit_processors.edit_logits` does to one row, but for penalties, done to all of a step.

    Masks go to the device once per request, and stay while it lives: a byte per token of the vocabulary.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._masks: WeakKeyDictionary[TokenEdits, Tensor] = WeakKeyDictionary()

    def apply(self, logits: Tensor, edits: tuple[RowEdits, ...], newest: Tensor | None) -> None:
        """In place. logits: [num_rows, vocab_size], contiguous. An entry may be written twice, with the same value.

        newest: as `TokenSampler.launch` has it
        """
        flat, device = logits.view(-1), logits.device
        biased = self._places((one.row, one.tokens.biased) for one in edits)
        if len(biased):
            values = np.concatenate([one.tokens.biases for one in edits]).astype(np.float64)
            flat.index_add_(0, to_device(biased, device), to_device(values, device).float())
        for one in edits:
            if one.tokens.forbidden is not None:
                logits[one.row].masked_fill_(self._mask(one.tokens, one.tokens.forbidden, device), -torch.inf)
        banned = self._places((one.row, one.banned) for one in edits)
        if len(banned):
            flat.index_fill_(0, to_device(banned, device), -torch.inf)
        after = [(one, one.banned_after) for one in edits if one.banned_after is not None]
        if after:
            assert newest is not None, "the tokens of the step before are not there"
            places = self._places((one.row, pairs[:, 1]) for one, pairs in after)
            needed = np.concatenate([pairs[:, 0] for _, pairs in after])
            sources = np.concatenate([np.full(len(pairs), one.source, dtype=np.int64) for one, pairs in after])
            where, tokens, rows = to_device(np.stack((places, needed, sources)), device)
            # added and not set: two words may end in one token, of which only one is complete
            zeros = torch.zeros(len(where), dtype=logits.dtype, device=device)
            flat.index_add_(0, where, zeros.masked_fill_(newest.index_select(0, rows) == tokens, -torch.inf))

    def _places(self, of_rows: Iterable[tuple[int, Ints]]) -> Ints:
        """Of tokens in the logits of all rows, one row behind the other."""
        return np.concatenate([row * self._vocab_size + tokens for row, tokens in of_rows])

    def _mask(self, edits: TokenEdits, forbidden: Bools, device: torch.device) -> Tensor:
        mask = self._masks.get(edits)
        if mask is None:
            mask = self._masks[edits] = to_device(forbidden, device)
        return mask
