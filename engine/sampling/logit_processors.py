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

from weakref import WeakKeyDictionary

import numpy as np

from engine.arrays import Bools, Floats, Ints
from engine.sampling.rows import SampledRow, is_penalised
from engine.sampling.token_counts import TokenHistory
from engine.types import SamplingParams, Scheduled, Sequence

_LARGEST = np.finfo(np.float32).max


def edits_logits(row: SampledRow) -> bool:
    """Whether the row's request may change any of its logits."""
    return edits_every_step(row.params) or row.params.min_tokens > row.num_output_tokens


def edits_every_step(params: SamplingParams) -> bool:
    """Whether a request may change a logit after its min_tokens too."""
    is_restricted = params.allowed_token_ids is not None or bool(params.bad_words)
    return is_penalised(params) or is_restricted or bool(params.logit_bias)


def needs_token_history(item: Scheduled) -> bool:
    """Whether a step of this request can only be sampled when the host knows all tokens before it."""
    params = item.seq.params
    return is_penalised(params) or any(len(word) > 1 for word in params.bad_words)


def penalise(logits: Floats, row: SampledRow, history: TokenHistory) -> None:
    """Applies the penalties of a row's request, in place. logits: [vocab_size]"""
    params = row.params
    token_ids, counts = history.counts(row.path)
    found = logits[token_ids]
    if params.repetition_penalty != 1.0:
        penalty = np.float32(params.repetition_penalty)
        found = np.where(found > 0, found / penalty, found * penalty)
        np.minimum(found, _LARGEST, out=found)  # a penalty near 0 may overflow
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        subtracted = params.frequency_penalty * counts + params.presence_penalty
        found -= np.where(counts > 0, subtracted, 0.0).astype(np.float32)
    logits[token_ids] = found


class LogitEdits:
    """The bias and the bans of one request as arrays, made once, when its first token is sampled.

    A client may name as many tokens as the vocabulary has; a step pays for arrays and look-ups, not for lists.

    biased, biases: [num_biased] token ids, and what is added to their logits
    forbidden: [vocab_size] every token but the allowed ones; None where all are allowed
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        num_biased = len(params.logit_bias)
        self.biased: Ints = np.fromiter(params.logit_bias, dtype=np.int64, count=num_biased)
        self.biases: Floats = np.fromiter(params.logit_bias.values(), dtype=np.float32, count=num_biased)
        self.forbidden: Bools | None = None
        if params.allowed_token_ids is not None:
            self.forbidden = np.ones(vocab_size, dtype=np.bool_)
            self.forbidden[params.allowed_token_ids] = False
        # a tokenizer may know stop tokens that the model does not
        self._stops = np.array([token for token in params.stop_token_ids if token < vocab_size], dtype=np.int64)
        self._min_tokens = params.min_tokens
        self._words = BadWords([word for word in params.bad_words if word[-1] < vocab_size])

    def banned(self, row: SampledRow) -> Ints:
        """The ends of bad words, and stop tokens that would come too early."""
        ends = self._words.ends(row.item.seq.token_ids, row.path)
        return np.concatenate((ends, self._stops)) if row.num_output_tokens < self._min_tokens else ends


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


class LogitEditsOfSequences:
    """The edits of the sequences that live."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._by_seq: WeakKeyDictionary[Sequence, LogitEdits] = WeakKeyDictionary()

    def of(self, seq: Sequence) -> LogitEdits:
        edits = self._by_seq.get(seq)
        if edits is None:
            edits = self._by_seq[seq] = LogitEdits(seq.params, self._vocab_size)
        return edits


def bias_and_ban(logits: Floats, row: SampledRow, edits: LogitEdits) -> None:
    """Applies the bias and the bans of a row's request, in place. logits: [vocab_size]"""
    if len(edits.biased):
        logits[edits.biased] += edits.biases
    if edits.forbidden is not None:
        np.copyto(logits, -np.inf, where=edits.forbidden)
    logits[edits.banned(row)] = -np.inf
