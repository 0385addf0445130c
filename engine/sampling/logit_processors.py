"""Logit processors: the penalties, the bias and the bans that a request asks for.

Applied in this order, each to what the one before left:

1. repetition penalty, over the tokens of prompt and output: a positive logit is divided by it, a negative one
   multiplied (Keskar et al. 2019, "CTRL", section 4.1, with the sign handled as all servers do);
2. frequency penalty times the number of occurrences, plus presence penalty, over the output, subtracted;
3. logit bias, added;
4. bans: every token but the allowed ones, the last token of a bad word whose other tokens have just been written
   (the end of the prompt counts), stop tokens before min_tokens.

For a row behind drafts, the drafts on its path count as output.
"""

from __future__ import annotations

import numpy as np

from engine.arrays import Bools, Floats, Ints
from engine.batch.step_inputs import PenaltyInputs, RowEdits, TokenEdits
from engine.types import SamplingParams

_LARGEST = np.finfo(np.float32).max


def edits_every_step(params: SamplingParams) -> bool:
    """Whether a request may change a logit after its min_tokens too."""
    is_restricted = params.allowed_token_ids is not None or bool(params.bad_words)
    return is_penalised(params) or is_restricted or bool(params.logit_bias)


def is_penalised(params: SamplingParams) -> bool:
    """Whether tokens count that the text already has."""
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def edit_logits(logits: Floats, edits: RowEdits) -> None:
    """Applies all that a row's request asks for, in place. logits: [vocab_size]"""
    if edits.penalties is not None:
        penalise(logits, edits.penalties)
    tokens = edits.tokens
    if len(tokens.biased):
        logits[tokens.biased] += tokens.biases
    if tokens.forbidden is not None:
        np.copyto(logits, -np.inf, where=tokens.forbidden)
    logits[edits.banned] = -np.inf


def penalise(logits: Floats, penalties: PenaltyInputs) -> None:
    """Applies the penalties of a row, in place. logits: [vocab_size]"""
    token_ids, counts = penalties.token_ids, penalties.counts
    assert token_ids is not None, "counts that an executor keeps are not the host's to read"
    assert counts is not None
    found = logits[token_ids]
    if penalties.repetition != 1.0:
        penalty = np.float32(penalties.repetition)
        found = np.where(found > 0, found / penalty, found * penalty)
        np.minimum(found, _LARGEST, out=found)  # a penalty near 0 may overflow
    if penalties.frequency != 0.0 or penalties.presence != 0.0:
        subtracted = penalties.frequency * counts + penalties.presence
        found -= np.where(counts > 0, subtracted, 0.0).astype(np.float32)
    logits[token_ids] = found


class LogitEdits:
    """The bias and the bans of one request, made once, when its first token is sampled.

    A client may name as many tokens as the vocabulary has; a step pays for arrays and look-ups, not for lists.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        num_biased = len(params.logit_bias)
        forbidden: Bools | None = None
        if params.allowed_token_ids is not None:
            forbidden = np.ones(vocab_size, dtype=np.bool_)
            forbidden[params.allowed_token_ids] = False
        self.tokens = TokenEdits(
            biased=np.fromiter(params.logit_bias, dtype=np.int64, count=num_biased),
            biases=np.fromiter(params.logit_bias.values(), dtype=np.float32, count=num_biased),
            forbidden=forbidden,
        )
        # a tokenizer may know stop tokens that the model does not
        self._stops = np.array([token for token in params.stop_token_ids if token < vocab_size], dtype=np.int64)
        self._min_tokens = params.min_tokens
        self._words = BadWords([word for word in params.bad_words if word[-1] < vocab_size])

    def banned(self, token_ids: list[int], path: list[int], num_output_tokens: int) -> Ints:
        """The ends of bad words after a text and the drafts on a path, and stop tokens that would come too early."""
        return self._with_stops(self._words.ends(token_ids, path), num_output_tokens)

    def banned_ahead(self, token_ids: list[int], num_output_tokens: int) -> tuple[Ints, Ints | None]:
        """The same, `banned` and `banned_after` of `RowEdits`, while the text's newest token is not known."""
        pairs = self._words.ends_ahead(token_ids)
        return self._with_stops(self._words.single, num_output_tokens), pairs if len(pairs) else None

    def _with_stops(self, banned: Ints, num_output_tokens: int) -> Ints:
        return np.concatenate((banned, self._stops)) if num_output_tokens < self._min_tokens else banned


class BadWords:
    """Token sequences that must not be completed, by the token before the last one."""

    def __init__(self, words: list[list[int]]) -> None:
        self._single = np.array([word[0] for word in words if len(word) == 1], dtype=np.int64)
        self._by_token_before: dict[int, list[list[int]]] = {}
        for word in words:
            if len(word) > 1:
                self._by_token_before.setdefault(word[-2], []).append(word)
        self._longest = max(map(len, words), default=0)

    def ends(self, token_ids: list[int], path: list[int]) -> Ints:
        """The tokens that would complete a word after the text and the drafts on a path."""
        newest = path[-1] if path else token_ids[-1]
        words = self._by_token_before.get(newest)
        if words is None:
            return self._single
        before = token_ids[-self._longest :] + path
        # A start before the text's first token makes a slice that is too short to match.
        found = [word[-1] for word in words if before[len(before) - len(word) + 1 :] == word[:-1]]
        return np.concatenate((self._single, np.array(found, dtype=np.int64)))

    def ends_ahead(self, token_ids: list[int]) -> Ints:
        """Pairs of a newest token that is not known yet, and the token that would then complete a word. [n, 2]"""
        found = [
            (before, word[-1])
            for before, words in self._by_token_before.items()
            for word in words
            if len(word) == 2 or token_ids[len(token_ids) - len(word) + 2 :] == word[:-2]
        ]
        return np.array(found, dtype=np.int64).reshape(len(found), 2)

    @property
    def single(self) -> Ints:
        """Tokens that are a word alone."""
        return self._single
