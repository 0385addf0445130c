"""Sampling metadata: what decides the tokens of a step's rows, as arrays, gathered from the sequences of a plan.

Host only. What a sequence asks for is read once, while it lives; the facts of all rows are one object as long as the
sequences stay the same, so that a GPU keeps them too (`engine.sampling.device_columns`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from engine.arrays import Ints
from engine.batch.gather import GatheredStep, last_rows
from engine.batch.step_inputs import (
    KNOWN,
    NO_INTS,
    CountChanges,
    LogprobInputs,
    PenaltyInputs,
    RowEdits,
    RowFacts,
    SamplingInputs,
)
from engine.sampling.logit_processors import LogitEdits, edits_every_step, is_penalised
from engine.sampling.token_counts import CountKeeper, TokenHistories
from engine.sampling.truncation import limits_of
from engine.sampling.typical import TypicalRule, typical_inputs
from engine.structured.grammar_states import GrammarStates
from engine.types import SamplingParams, Scheduled, Sequence

GREEDY_BELOW = 1e-5  # a temperature: the noise, at most 22, could not reverse a difference of 3e-4 between logits
_SEED = (1 << 64) - 1


class _SequenceFacts(NamedTuple):
    """What `RowFacts` has of a sequence's rows."""

    seed: int
    numbers: tuple[float, float, float, float, float]  # temperature, max_gap, top_k, top_p, edits before position


class SamplingBuilder:
    """Makes each step's `SamplingInputs`.

    counts: who keeps the token counts of penalised sequences where the executor counts itself; None: the host counts
    typical: keeps drafts that are likely enough, which is lossy; None: drafts that are sampled
    grammars: of the sequences; None: they have none
    """

    def __init__(
        self,
        vocab_size: int,
        counts: CountKeeper | None = None,
        *,
        typical: TypicalRule | None = None,
        grammars: GrammarStates | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.typical, self.grammars = typical, grammars
        self._counts = counts
        self._histories = TokenHistories()
        self._known: WeakKeyDictionary[Sequence, _SequenceFacts] = WeakKeyDictionary()
        self._edits: WeakKeyDictionary[Sequence, LogitEdits] = WeakKeyDictionary()
        self._seqs: list[Sequence] = []  # of the rows of `_facts`, and how many each has
        self._num_rows: Ints = NO_INTS
        self._facts: RowFacts | None = None
        self._has_edits = False  # whether any of those rows may ever be edited

    def build(self, batch: list[Scheduled], step: GatheredStep) -> SamplingInputs:
        seqs = step.seqs
        if len(step.logits_rows) == len(batch) == len(step.input_ids) and not step.has_scores:  # a token each
            logits_rows, positions, num_rows = step.logits_rows, step.seq_lens, seqs.num_sampled
        else:
            logits_rows = last_rows((seqs.num_scored + seqs.num_sampled).cumsum(), seqs.num_sampled)
            positions = step.positions[step.logits_rows[logits_rows]] + 1
            num_rows = seqs.num_sampled[seqs.num_sampled > 0]
        facts = self._facts_of([item.seq for item in batch if item.samples], num_rows)
        edits, counts = self.edits(batch, positions, facts)
        return SamplingInputs(
            logits_rows=logits_rows,
            positions=positions,
            facts=facts,
            edits=edits,
            counts=counts,
            logprobs=logprob_inputs(batch) if step.has_scores or step.wants_logprobs else None,
            typical=None if self.typical is None else typical_inputs(batch, self.typical, GREEDY_BELOW),
            masks=None if self.grammars is None else self.grammars.masks(batch),
        )

    def advance(self, batch: list[Scheduled], before: SamplingInputs) -> SamplingInputs:
        """The inputs of the step after one that decodes a token of each sequence, of the same sequences.

        batch: of the step that comes, each item with one token whose source is its own row
        """
        positions = before.positions + 1
        edits, counts = self.edits(batch, positions, before.facts)
        return replace(before, positions=positions, edits=edits, counts=counts)

    def edits(
        self, batch: list[Scheduled], positions: Ints, facts: RowFacts
    ) -> tuple[tuple[RowEdits, ...], CountChanges | None]:
        """The fields `edits` and `counts` of `SamplingInputs`. positions: [num_sampled]"""
        if facts is self._facts and not self._has_edits:
            return (), None
        is_edited = positions < facts.edits_before
        if not is_edited.any():
            return (), None
        edits: list[RowEdits] = []
        penalised: list[tuple[int, Scheduled, list[int]]] = []  # row, item, path
        row = 0
        for item in batch:
            if not item.samples:
                continue
            end = row + 1 + item.num_drafts
            if is_edited[row:end].any():
                is_counted = self._counts is not None and is_penalised(item.seq.request.params)
                paths = [[], *draft_paths(item)]
                for i, path in enumerate(paths, start=row):
                    if is_edited[i]:
                        edits.append(self._row_edits(i, item, path, int(positions[i])))
                    if is_counted:
                        penalised.append((i, item, path))
            row = end
        counts = None if self._counts is None or not penalised else self._counts.changes(penalised, num_rows=row)
        return tuple(edits), counts

    def forget(self, batch: list[Scheduled]) -> None:
        """A step of these failed: how much of its changes were made is not known."""
        if self._counts is not None:
            self._counts.forget([item.seq for item in batch])

    def needs_host(self, item: Scheduled) -> bool:
        """Whether a step of this sequence can only be sampled when the host knows all tokens before it."""
        params = item.seq.request.params
        if params.grammar is not None and item.samples and item.source != KNOWN:
            return True
        return self._counts is None and is_penalised(params)

    def _facts_of(self, seqs: list[Sequence], num_rows: Ints) -> RowFacts:
        """The same object as the last time where the rows are of the same sequences. num_rows: of each sequence"""
        is_alike = num_rows is self._num_rows or np.array_equal(num_rows, self._num_rows)
        if self._facts is not None and is_alike and seqs == self._seqs:
            return self._facts
        known = [self._sequence_facts(seq) for seq in seqs]
        seq_of_row = np.repeat(np.arange(len(seqs)), num_rows)
        numbers = np.array([one.numbers for one in known], dtype=np.float64).reshape(len(known), 5)
        temperatures, max_gaps, top_ks, top_ps, edits_before = numbers[seq_of_row].T
        facts = RowFacts(
            seeds=np.array([one.seed for one in known], dtype=np.uint64)[seq_of_row],
            temperatures=temperatures.astype(np.float32),
            max_gaps=max_gaps.astype(np.float32),
            top_ks=top_ks.astype(np.int64),
            top_ps=top_ps.copy(),
            edits_before=edits_before.copy(),
            seq_of_row=seq_of_row,
        )
        self._seqs, self._num_rows, self._facts = seqs, num_rows, facts
        self._has_edits = bool((facts.edits_before > 0).any())
        return facts

    def _sequence_facts(self, seq: Sequence) -> _SequenceFacts:
        facts = self._known.get(seq)
        if facts is None:
            facts = self._known[seq] = _read_facts(seq.request.params, seq.num_prompt_tokens, self.vocab_size)
        return facts

    def _row_edits(self, row: int, item: Scheduled, path: list[int], position: int) -> RowEdits:
        seq, params = item.seq, item.seq.request.params
        edits = self._edits.get(seq)
        if edits is None:
            edits = self._edits[seq] = LogitEdits(params, self.vocab_size)
        penalties = None
        if is_penalised(params):
            numbers = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
            known = (None, None) if self._counts is not None else self._histories.of(seq).counts(path)
            penalties = PenaltyInputs(*numbers, *known)
        num_output_tokens = position - seq.num_prompt_tokens
        if item.source == KNOWN:
            banned = edits.banned(seq.token_ids, path, num_output_tokens)
            return RowEdits(row, penalties, edits.tokens, banned)
        banned, banned_after = edits.banned_ahead(seq.token_ids, num_output_tokens)
        return RowEdits(row, penalties, edits.tokens, banned, banned_after, item.source)


def draft_paths(item: Scheduled) -> list[list[int]]:
    """The draft tokens from the root down to each draft, itself included."""
    paths: list[list[int]] = []
    seq = item.seq
    for token, parent in zip(seq.draft_token_ids[: item.num_drafts], seq.draft_parents[: item.num_drafts], strict=True):
        paths.append([*([] if parent < 0 else paths[parent]), token])
    return paths


def logprob_inputs(batch: list[Scheduled]) -> LogprobInputs | None:
    """What the items ask: of their scored rows, then, where log-probabilities are wanted, of their sampled rows. None:
    of no row."""
    rows: list[int] = []
    num_top: list[int] = []
    tokens: list[int] = []
    first = 0
    for item in batch:
        params, num_logits = item.seq.request.params, item.num_logits
        after = item.num_computed_tokens + item.num_new_tokens - num_logits + 1
        tokens += item.seq.token_ids[after : after + item.num_scored] + [0] * item.num_sampled_rows
        rows += range(first, first + item.num_scored)
        num_top += [params.prompt_logprobs or 0] * item.num_scored
        if params.logprobs is not None:
            rows += range(first + item.num_scored, first + num_logits)
            num_top += [params.logprobs] * item.num_sampled_rows
        first += num_logits
    if not rows:
        return None
    return LogprobInputs(*(np.array(part, dtype=np.int64) for part in (rows, num_top, tokens)))


def _read_facts(params: SamplingParams, num_prompt_tokens: int, vocab_size: int) -> _SequenceFacts:
    limits = limits_of(params, vocab_size)
    temperature = params.temperature if params.temperature >= GREEDY_BELOW else 0.0
    edits_before = 0.0
    if edits_every_step(params):
        edits_before = math.inf
    elif params.min_tokens:
        edits_before = float(num_prompt_tokens + params.min_tokens)
    return _SequenceFacts(
        params.seed & _SEED, (temperature, float(limits.max_gap), limits.top_k, limits.top_p, edits_before)
    )
