"""What penalties look at on a GPU: a row of counts per penalised sequence, to which a step adds the newest token."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch
from torch import Tensor

from engine.penalties import is_penalised
from engine.sampled_rows import SampledRow
from engine.transfer import to_device
from engine.types import Sequence


@dataclass(slots=True)
class _State:
    place: int
    num_seen: int = 0  # of the sequence's tokens
    is_fresh: bool = True  # what lies in its place is another's


class TokenCounts:
    """States of sequences, made when they are first asked for and reused when a sequence is gone.

    counts: [num_states, vocab_size] int32, occurrences in the output; is_in_prompt: the same shape, bool. They grow by
    doubling: 5 bytes per state and token. State 0 stands for all rows without penalties: nobody reads it.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.counts = torch.zeros(1, vocab_size, dtype=torch.int32)
        self.is_in_prompt = torch.zeros(1, vocab_size, dtype=torch.bool)
        self._states: WeakKeyDictionary[Sequence, _State] = WeakKeyDictionary()
        self._num_places = 1  # in use or free
        self._free: list[int] = []
        self._copies: list[int] = []  # places of rows behind drafts, until the next step

    def states(self, rows: list[SampledRow], device: torch.device) -> Tensor:
        """The state of each row, up to its newest token. [num_rows] int64, valid until the next call

        Rows behind drafts get a copy of their sequence's state, with the drafts counted.
        """
        self._free += self._copies
        self._copies = []
        places = [0] * len(rows)
        writes = _Writes()
        try:
            for i, row in enumerate(rows):
                if is_penalised(row.params):
                    places[i] = self._catch_up(row.item.seq, writes)
                    if row.path:
                        places[i] = self._copy(places[i], row.path, writes)
            self._grow(device)
            self._write(writes, device)
            return to_device(np.array(places, dtype=np.int64), device)
        except BaseException:  # how much of it was written is not known: the next time, they are counted from nothing
            for row in rows:
                self._forget(row.item.seq)
            raise

    def _forget(self, seq: Sequence) -> None:
        """Its place stays its own until it is gone."""
        state = self._states.get(seq)
        if state is not None:
            state.num_seen, state.is_fresh = 0, True

    def _catch_up(self, seq: Sequence, writes: _Writes) -> int:
        """Notes what the sequence gained since the last time. Returns its place."""
        state = self._states.get(seq)
        if state is None:
            place = self._take()
            finalize(seq, self._free.append, place).atexit = False
            state = self._states[seq] = _State(place)
        if state.is_fresh:
            writes.fresh.append(state.place)
            state.is_fresh = False
        start, num_prompt_tokens = state.place * self.vocab_size, seq.num_prompt_tokens
        new_prompt_tokens = seq.token_ids[state.num_seen : num_prompt_tokens]
        writes.in_prompt += [start + token for token in new_prompt_tokens]
        writes.in_output += [start + token for token in seq.token_ids[max(state.num_seen, num_prompt_tokens) :]]
        state.num_seen = seq.num_tokens
        return state.place

    def _copy(self, source: int, path: list[int], writes: _Writes) -> int:
        place = self._take()
        self._copies.append(place)
        writes.sources.append(source)
        writes.targets.append(place)
        writes.behind_drafts += [place * self.vocab_size + token for token in path]
        return place

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        self._num_places += 1
        return self._num_places - 1

    def _grow(self, device: torch.device) -> None:
        num_states = len(self.counts)
        if num_states < self._num_places or self.counts.device != device:
            num_states = max(self._num_places, 2 * num_states)
            counts = torch.zeros(num_states, self.vocab_size, dtype=torch.int32, device=device)
            is_in_prompt = torch.zeros(num_states, self.vocab_size, dtype=torch.bool, device=device)
            counts[: len(self.counts)] = self.counts
            is_in_prompt[: len(self.counts)] = self.is_in_prompt
            self.counts, self.is_in_prompt = counts, is_in_prompt  # both or neither

    def _write(self, writes: _Writes, device: torch.device) -> None:
        sizes = [len(places) for places in astuple(writes)]
        whole = np.array([place for places in astuple(writes) for place in places], dtype=np.int64)
        parts = torch.split(to_device(whole, device), sizes)
        fresh, in_prompt, in_output, sources, targets, behind_drafts = parts
        if len(fresh):
            self.counts.index_fill_(0, fresh, 0)
            self.is_in_prompt.index_fill_(0, fresh, False)
        self.is_in_prompt.view(-1).index_fill_(0, in_prompt, True)
        counts = self.counts.view(-1)
        counts.index_add_(0, in_output, torch.ones_like(in_output, dtype=torch.int32))
        if len(sources):
            self.counts.index_copy_(0, targets, self.counts.index_select(0, sources))
            self.is_in_prompt.index_copy_(0, targets, self.is_in_prompt.index_select(0, sources))
            counts.index_add_(0, behind_drafts, torch.ones_like(behind_drafts, dtype=torch.int32))


@dataclass(slots=True)
class _Writes:
    """What a step changes in the states, in this order. Places of tokens are state * vocab_size + token."""

    fresh: list[int] = field(default_factory=list)  # states to begin with nothing
    in_prompt: list[int] = field(default_factory=list)
    in_output: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)  # states to copy for rows behind drafts
    targets: list[int] = field(default_factory=list)
    behind_drafts: list[int] = field(default_factory=list)
