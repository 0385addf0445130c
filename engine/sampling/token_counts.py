"""Token counts of penalised sequences, kept from step to step: what penalties look at.

The host keeps the distinct tokens of each sequence (`TokenHistory`), a GPU a row of counts per sequence, to which a
step adds the newest token (`TokenCounts`).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Ints
from engine.batch.transfer import to_device
from engine.sampling.rows import SampledRow, is_penalised
from engine.types import Sequence


class TokenHistory:
    """The distinct tokens of a sequence and their numbers of occurrences in the output.

    Prompt tokens are among them only `with_prompt`, with what they have in the output, which may be nothing.
    """

    def __init__(self, num_prompt_tokens: int, *, with_prompt: bool) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._num_seen = 0 if with_prompt else num_prompt_tokens  # of the sequence's tokens
        self._places: dict[int, int] = {}
        self._token_ids = np.empty(256, dtype=np.int64)
        self._counts = np.zeros(256, dtype=np.int64)

    def catch_up(self, token_ids: list[int]) -> list[int]:
        """Takes in what the sequence gained since the last time, and returns those tokens.

        token_ids: all of the sequence's; what they began with the last time, they still begin with
        """
        new_tokens = token_ids[self._num_seen :]
        for position, token in enumerate(new_tokens, start=self._num_seen):
            self._add(token, 1 if position >= self._num_prompt_tokens else 0)
        self._num_seen = max(self._num_seen, len(token_ids))
        return new_tokens

    def counts(self, path: list[int]) -> tuple[Ints, Ints]:
        """The tokens and their counts, with the drafts on a path as output. Read only, until the next call."""
        num_tokens = len(self._places)
        token_ids, counts = self._token_ids[:num_tokens], self._counts[:num_tokens]
        if not path:
            return token_ids, counts
        added = [token for token in dict.fromkeys(path) if token not in self._places]
        places = {token: num_tokens + i for i, token in enumerate(added)}
        token_ids = np.concatenate((token_ids, np.array(added, dtype=np.int64)))
        counts = np.concatenate((counts, np.zeros(len(added), dtype=np.int64)))
        for token in path:
            counts[places[token] if token in places else self._places[token]] += 1
        return token_ids, counts

    def _add(self, token: int, count: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._token_ids):
            self._token_ids = np.concatenate((self._token_ids, np.empty_like(self._token_ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._token_ids[place] = token
        self._counts[place] += count


class TokenHistories:
    """The histories of the sequences that live and are penalised."""

    def __init__(self) -> None:
        self._by_seq: WeakKeyDictionary[Sequence, TokenHistory] = WeakKeyDictionary()

    def of(self, seq: Sequence) -> TokenHistory:
        """The history of a sequence, up to its newest token."""
        history = self._by_seq.get(seq)
        if history is None:
            with_prompt = seq.params.repetition_penalty != 1.0
            history = TokenHistory(seq.num_prompt_tokens, with_prompt=with_prompt)
        self._by_seq.pop(seq, None)  # half a history, if it fails in between, would count tokens twice
        history.catch_up(seq.token_ids)
        self._by_seq[seq] = history
        return history


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
