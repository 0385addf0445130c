"""Which tokens a sequence has, and how often: what penalties look at, kept from step to step."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np

from engine.candidates import Ints
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
