"""What the sampling kernel needs to know of each row, brought to the device as seldom as can be."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.arrays import Ints
from engine.batch.transfer import to_device
from engine.sampling.logit_processors import edits_every_step
from engine.sampling.noise import Words, Words64, noise_keys
from engine.sampling.sampler import GREEDY_BELOW
from engine.sampling.truncation import limits_of
from engine.types import Sequence

_SEED = (1 << 64) - 1
_KEYS_AT_ONCE = 8192  # of all rows: a key of a thousand costs three times what one of so many does
_MIN_STEPS, _MAX_STEPS = 16, 256  # that they are for


class Columns:
    """The columns of the rows of certain sequences. Only the noise keys change from step to step.

    is_random, is_truncated: as `sample_tokens` has them

    All goes to the device as one array of 8-byte words, four a row, so that it is one copy:

        [ top_ps | top_ks | keys, two 32-bit words | temperatures, then max_gaps, float32 ]

    Each is filled up to four rows: Triton compiles a kernel once more for addresses that are no multiples of 16 bytes.
    """

    def __init__(
        self, seqs: list[Sequence], positions: Ints, device: torch.device, *, vocab_size: int, before: Columns | None
    ) -> None:
        """seqs: the sequence of each row, one after the other; positions: of the rows of the step that they are first
        needed for; before: the columns of another step, with most of the same sequences"""
        self.seqs = seqs
        self._device = device
        known: dict[Sequence, _Facts] = {} if before is None else before._known
        self._known: dict[Sequence, _Facts] = {
            seq: known.get(seq) or _read_facts(seq, vocab_size) for seq in dict.fromkeys(seqs)
        }
        facts = [self._known[seq] for seq in seqs]
        numbers = np.array([one.numbers for one in facts], dtype=np.float64).T
        self._edits_before: NDArray[np.float64] | None = numbers[4] if numbers[4].any() else None
        self._seeds = np.array([one.seed for one in facts], dtype=np.uint64)
        self._draft_keys: _DraftKeys | None = None  # of sequences that have or had drafts
        if before is not None and list(before._known) == list(self._known):
            self._draft_keys = before._draft_keys
        if self._draft_keys is None and len(self._known) < len(seqs):
            self._draft_keys = _DraftKeys([one.seed for one in self._known.values()])
        if self._draft_keys is not None:
            places = {seq: place for place, seq in enumerate(self._known)}
            self._places = np.array([places[seq] for seq in seqs], dtype=np.int64)
        is_random = numbers[2] > 0.0
        self.is_random = bool(is_random.any())
        self.is_truncated = bool((is_random & ((numbers[0] < 1.0) | (numbers[1] < vocab_size))).any())
        num_rows = len(seqs)
        words = np.zeros((4, num_rows + -num_rows % 4), dtype=np.int64)
        words[0, :num_rows] = numbers[0].copy().view(np.int64)
        words[1, :num_rows] = numbers[1]
        words[2, :num_rows] = self._host_keys(positions)
        words[3].view(np.float32).reshape(2, -1)[:, :num_rows] = numbers[2:4]
        there = to_device(words, device)
        top_ps, self._top_ks = there[:2, :num_rows].unbind()
        self._top_ps = top_ps.view(torch.float64)
        self._temperatures, self._max_gaps = there[3].view(torch.float32).view(2, -1)[:, :num_rows].unbind()
        self._first = positions  # of the first of the keys
        self._keys = self._as_keys(there[2:3])  # of one step, and once the sequences have stayed, of many

    def at(self, positions: Ints) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Temperatures, keys, max_gaps, top_ks and top_ps as `sample_tokens` takes them. positions: [num_rows]"""
        return self._temperatures, self._keys_at(positions), self._max_gaps, self._top_ks, self._top_ps

    def edit_logits(self, positions: Ints) -> bool:
        """Whether any row's request changes any logit in this step."""
        return self._edits_before is not None and bool((positions < self._edits_before).any())

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
            host = _pack(noise_keys(np.tile(self._seeds, num_steps), ahead)).reshape(num_steps, -1)
        filled_up = np.zeros((len(host), num_rows + -num_rows % 4), dtype=np.int64)
        filled_up[:, :num_rows] = host
        self._first, self._keys = positions, self._as_keys(to_device(filled_up, self._device))
        return self._keys[0]

    def _host_keys(self, positions: Ints) -> Ints:
        if self._draft_keys is None:
            return _pack(noise_keys(self._seeds, positions))
        return self._draft_keys.at(self._places, positions)

    def _as_keys(self, words: Tensor) -> tuple[Tensor, ...]:
        """Of each step [num_rows, 2] int32. words: [num_steps, num_rows, filled up] int64"""
        return words.view(torch.int32).view(len(words), -1, 2)[:, : len(self.seqs)].unbind()


def _num_steps(num_rows: int) -> int:
    return min(max(_MIN_STEPS, _KEYS_AT_ONCE // num_rows), _MAX_STEPS)


class _DraftKeys:
    """Noise keys of sequences that move by different numbers of tokens, made for many positions of each at once."""

    def __init__(self, seeds: list[int]) -> None:
        self._seeds: Words64 = np.array(seeds, dtype=np.uint64)
        self._num_positions = 4 * _num_steps(4 * len(seeds))
        self._first: Ints | None = None  # [num_seqs] position of each one's first key
        self._keys: Ints = np.zeros((len(seeds), 0), dtype=np.int64)

    def at(self, places: Ints, positions: Ints) -> Ints:
        """A row's two key words in one number. [num_rows]; places: which sequence a row is of"""
        if self._first is not None:
            offsets = positions - self._first[places]
            if offsets.min() >= 0 and offsets.max() < self._num_positions:
                found: Ints = self._keys[places, offsets]
                return found
        first = np.full(len(self._seeds), np.iinfo(np.int64).max)
        np.minimum.at(first, places, positions)
        all_positions = (first[:, None] + np.arange(self._num_positions)).reshape(-1)
        keys = _pack(noise_keys(np.repeat(self._seeds, self._num_positions), all_positions))
        self._first, self._keys = first, keys.reshape(len(first), -1)
        assert (positions - first[places]).max() < self._num_positions, "a sequence has more drafts than keys"
        return self.at(places, positions)


class _Facts(NamedTuple):
    """What the kernel needs to know of a sequence, and never changes."""

    seed: int
    numbers: tuple[float, float, float, float, float]  # top_p, top_k, temperature, max_gap, edits before position


def _read_facts(seq: Sequence, vocab_size: int) -> _Facts:
    params, limits = seq.params, limits_of(seq.params, vocab_size)
    temperature = params.temperature if params.temperature >= GREEDY_BELOW else 0.0
    edits_before = 0.0
    if edits_every_step(params):
        edits_before = math.inf
    elif params.min_tokens:
        edits_before = float(seq.num_prompt_tokens + params.min_tokens)
    numbers = limits.top_p, limits.top_k, temperature, float(limits.max_gap), edits_before
    return _Facts(params.seed & _SEED, numbers)


def _pack(keys: Words) -> Ints:
    """keys: [num_rows, 2]; returns [num_rows]"""
    return keys.reshape(-1).view(np.int64)
