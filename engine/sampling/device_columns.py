"""The facts of sampled rows as columns on a GPU, copied there once for as long as the sequences stay the same."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Ints
from engine.batch.device_inputs import to_device
from engine.batch.step_inputs import RowFacts
from engine.sampling.noise import Words, Words64, noise_keys

_KEYS_AT_ONCE = 8192  # of all rows: a key of a thousand costs three times what one of so many does
_MIN_STEPS, _MAX_STEPS = 16, 256  # that they are for


class Columns:
    """The columns of one `RowFacts`. Only the noise keys change from step to step.

    is_random, is_truncated: as `sample_tokens` has them

    All goes to the device as one array of 8-byte words, four a row, so that it is one copy:

        [ top_ps | top_ks | keys, two 32-bit words | temperatures, then max_gaps, float32 ]

    Each is filled up to four rows: Triton compiles a kernel once more for addresses that are no multiples of 16 bytes.
    """

    def __init__(
        self, facts: RowFacts, positions: Ints, device: torch.device, *, vocab_size: int, before: Columns | None
    ) -> None:
        """positions: of the rows of the step that they are first needed for; before: the columns of another step, whose
        keys are kept where the sequences are the same"""
        self.facts = facts
        self._device = device
        num_rows = len(facts.seeds)
        self._seq_seeds: Words64 = facts.seeds[np.unique(facts.seq_of_row, return_index=True)[1]]
        self._draft_keys: _DraftKeys | None = None  # of sequences that have or had drafts
        if before is not None and np.array_equal(before._seq_seeds, self._seq_seeds):
            self._draft_keys = before._draft_keys
        if self._draft_keys is None and len(self._seq_seeds) < num_rows:
            self._draft_keys = _DraftKeys(self._seq_seeds)
        is_random = facts.temperatures > 0.0
        self.is_random = bool(is_random.any())
        self.is_truncated = bool((is_random & ((facts.top_ps < 1.0) | (facts.top_ks < vocab_size))).any())
        words = np.zeros((4, num_rows + -num_rows % 4), dtype=np.int64)
        words[0, :num_rows] = facts.top_ps.view(np.int64)
        words[1, :num_rows] = facts.top_ks
        words[2, :num_rows] = self._host_keys(positions)
        words[3].view(np.float32).reshape(2, -1)[:, :num_rows] = facts.temperatures, facts.max_gaps
        there = to_device(words, device)
        top_ps, self._top_ks = there[:2, :num_rows].unbind()
        self._top_ps = top_ps.view(torch.float64)
        self._temperatures, self._max_gaps = there[3].view(torch.float32).view(2, -1)[:, :num_rows].unbind()
        self._first = positions.copy()  # of the first of the keys
        self._keys = self._as_keys(there[2:3])  # of one step, and once the sequences have stayed, of many

    def at(self, positions: Ints) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Temperatures, keys, max_gaps, top_ks and top_ps as `sample_tokens` takes them. positions: [num_rows]"""
        return self._temperatures, self._keys_at(positions), self._max_gaps, self._top_ks, self._top_ps

    def _keys_at(self, positions: Ints) -> Tensor:
        step = int(positions[0] - self._first[0])
        if 0 <= step < len(self._keys) and np.array_equal(self._first + step, positions):
            return self._keys[step]
        num_rows = len(positions)
        if self._draft_keys is not None:  # nobody knows which of them will be right, and so where the next step is
            host = self._host_keys(positions)[None]
        else:
            num_steps = _num_steps(num_rows)
            ahead = (positions + np.arange(num_steps)[:, None]).reshape(-1)
            host = _pack(noise_keys(np.tile(self.facts.seeds, num_steps), ahead)).reshape(num_steps, -1)
        filled_up = np.zeros((len(host), num_rows + -num_rows % 4), dtype=np.int64)
        filled_up[:, :num_rows] = host
        self._first, self._keys = positions.copy(), self._as_keys(to_device(filled_up, self._device))
        return self._keys[0]

    def _host_keys(self, positions: Ints) -> Ints:
        if self._draft_keys is None:
            return _pack(noise_keys(self.facts.seeds, positions))
        return self._draft_keys.at(self.facts.seq_of_row, positions)

    def _as_keys(self, words: Tensor) -> tuple[Tensor, ...]:
        """Of each step [num_rows, 2] int32. words: [num_steps, num_rows, filled up] int64"""
        return words.view(torch.int32).view(len(words), -1, 2)[:, : len(self.facts.seeds)].unbind()


def _num_steps(num_rows: int) -> int:
    return min(max(_MIN_STEPS, _KEYS_AT_ONCE // num_rows), _MAX_STEPS)


class _DraftKeys:
    """Noise keys of sequences that move by different numbers of tokens, made for many positions of each at once."""

    def __init__(self, seeds: Words64) -> None:
        self._seeds = seeds
        self._num_positions = 4 * _num_steps(4 * len(seeds))
        self._first: Ints | None = None  # [num_seqs] position of each one's first key
        self._keys: Ints = np.zeros((len(seeds), 0), dtype=np.int64)

    def at(self, seq_of_row: Ints, positions: Ints) -> Ints:
        """A row's two key words in one number. [num_rows]"""
        if self._first is not None:
            offsets = positions - self._first[seq_of_row]
            if offsets.min() >= 0 and offsets.max() < self._num_positions:
                found: Ints = self._keys[seq_of_row, offsets]
                return found
        first = np.full(len(self._seeds), np.iinfo(np.int64).max)
        np.minimum.at(first, seq_of_row, positions)
        all_positions = (first[:, None] + np.arange(self._num_positions)).reshape(-1)
        keys = _pack(noise_keys(np.repeat(self._seeds, self._num_positions), all_positions))
        self._first, self._keys = first, keys.reshape(len(first), -1)
        assert (positions - first[seq_of_row]).max() < self._num_positions, "a sequence has more drafts than keys"
        return self.at(seq_of_row, positions)


def _pack(keys: Words) -> Ints:
    """keys: [num_rows, 2]; returns [num_rows]"""
    return keys.reshape(-1).view(np.int64)
