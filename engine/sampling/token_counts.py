"""Token counts of penalised sequences, kept from step to step: what penalties look at.

Where the host samples, it has the distinct tokens of each sequence (`TokenHistory`). A GPU has a row of counts per
sequence (`TokenCounts`), and the host decides which row is whose and what a step adds to it (`CountKeeper`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Ints
from engine.batch.device_inputs import to_device
from engine.batch.step_inputs import CountChanges
from engine.types import Scheduled, Sequence


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


class CountKeeper:
    """Gives sequences states, rows of counts on the device, and says what a step changes in them. Host only.

    States are made when they are first asked for and reused when a sequence is gone. State 0 is of all rows without
    penalties.
    """

    def __init__(self) -> None:
        self._states: WeakKeyDictionary[Sequence, _State] = WeakKeyDictionary()
        self._num_places = 1  # in use or free
        self._free: list[int] = []
        self._copies: list[int] = []  # places of rows behind drafts, until the next step

    def changes(self, rows: list[tuple[int, Scheduled, list[int]]], *, num_rows: int) -> CountChanges:
        """rows: the sampled row, the item and the drafts on the path of each penalised row; num_rows: that are sampled

        They count as made: call `forget` for a step that failed.
        """
        self._free += self._copies
        self._copies = []
        states = np.zeros(num_rows, dtype=np.int64)
        writes = _Writes()
        seen: dict[Sequence, int] = {}
        for row, item, path in rows:
            if item.seq not in seen:
                seen[item.seq] = self._catch_up(item, writes)
            states[row] = self._copy(seen[item.seq], path, writes) if path else seen[item.seq]
        return CountChanges(
            states,
            self._num_places,
            np.array(writes.fresh, dtype=np.int64),
            *(
                np.array(pairs, dtype=np.int64).reshape(len(pairs), 2)
                for pairs in (writes.in_prompt, writes.in_output, writes.newest, writes.copies, writes.behind_drafts)
            ),
        )

    def forget(self, seqs: Iterable[Sequence]) -> None:
        """Whatever was written of these, they are counted from nothing the next time. Their places stay their own."""
        for seq in seqs:
            state = self._states.get(seq)
            if state is not None:
                state.num_seen, state.is_fresh = 0, True

    def _catch_up(self, item: Scheduled, writes: _Writes) -> int:
        """Notes what the sequence gained since the last time. Returns its state."""
        seq = item.seq
        state = self._states.get(seq)
        if state is None:
            place = self._take()
            finalize(seq, self._free.append, place).atexit = False
            state = self._states[seq] = _State(place)
        place = state.place
        if state.is_fresh:
            writes.fresh.append(place)
            state.is_fresh = False
        num_prompt_tokens = seq.num_prompt_tokens
        writes.in_prompt += [(place, token) for token in seq.token_ids[state.num_seen : num_prompt_tokens]]
        writes.in_output += [(place, token) for token in seq.token_ids[max(state.num_seen, num_prompt_tokens) :]]
        state.num_seen = max(state.num_seen, seq.num_tokens)
        if item.source >= 0 and state.num_seen < item.next_position:
            writes.newest.append((place, item.source))
            state.num_seen = item.next_position
        return place

    def _copy(self, source: int, path: list[int], writes: _Writes) -> int:
        place = self._take()
        self._copies.append(place)
        writes.copies.append((source, place))
        writes.behind_drafts += [(place, token) for token in path]
        return place

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        self._num_places += 1
        return self._num_places - 1


@dataclass(slots=True)
class _Writes:
    """`CountChanges` in the making."""

    fresh: list[int] = field(default_factory=list)
    in_prompt: list[tuple[int, int]] = field(default_factory=list)
    in_output: list[tuple[int, int]] = field(default_factory=list)
    newest: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    behind_drafts: list[tuple[int, int]] = field(default_factory=list)


class TokenCounts:
    """The states of penalised sequences, on a device.

    counts: [num_states, vocab_size] int32, occurrences in the output; is_in_prompt: the same shape, bool. They grow by
    doubling: 5 bytes per state and token.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.counts = torch.zeros(1, vocab_size, dtype=torch.int32)
        self.is_in_prompt = torch.zeros(1, vocab_size, dtype=torch.bool)

    def change(self, changes: CountChanges, newest: Tensor | None, device: torch.device) -> Tensor:
        """Makes a step's changes. Returns the state of each row. [num_sampled] int64

        newest: what the step before sampled, [its num_sampled] int64, where `changes.newest` names any of it
        """
        self._grow(changes.num_states, device)
        parts = [changes.fresh, changes.in_prompt, changes.in_output, changes.newest, changes.copies]
        parts += [changes.behind_drafts, changes.states]
        whole = to_device(np.concatenate([part.reshape(-1) for part in parts]), device)
        fresh, *pairs, states = torch.split(whole, [part.size for part in parts])
        in_prompt, in_output, from_device, copies, behind_drafts = (part.view(-1, 2) for part in pairs)
        if len(fresh):
            self.counts.index_fill_(0, fresh, 0)
            self.is_in_prompt.index_fill_(0, fresh, False)
        self.is_in_prompt.view(-1).index_fill_(0, self._places(in_prompt), True)
        self._count(self._places(in_output))
        if len(from_device):
            assert newest is not None, "the tokens of the step before are not there"
            # where no token could be chosen, the request ends, and what is counted is never read
            tokens = newest.index_select(0, from_device[:, 1]).clamp_min(0)
            self._count(from_device[:, 0] * self.vocab_size + tokens)
        if len(copies):
            sources, targets = copies.unbind(1)
            self.counts.index_copy_(0, targets, self.counts.index_select(0, sources))
            self.is_in_prompt.index_copy_(0, targets, self.is_in_prompt.index_select(0, sources))
            self._count(self._places(behind_drafts))
        return states

    def _count(self, places: Tensor) -> None:
        if len(places):
            self.counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def _places(self, pairs: Tensor) -> Tensor:
        return pairs[:, 0] * self.vocab_size + pairs[:, 1]

    def _grow(self, num_states: int, device: torch.device) -> None:
        num_before = len(self.counts)
        if num_before < num_states or self.counts.device != device:
            num_states = max(num_states, 2 * num_before)
            counts = torch.zeros(num_states, self.vocab_size, dtype=torch.int32, device=device)
            is_in_prompt = torch.zeros(num_states, self.vocab_size, dtype=torch.bool, device=device)
            counts[:num_before] = self.counts
            is_in_prompt[:num_before] = self.is_in_prompt
            self.counts, self.is_in_prompt = counts, is_in_prompt  # both or neither
