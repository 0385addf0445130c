"""The sampler of a CPU: row after row with numpy, whose passes over a vocabulary take a third to a fifteenth of torch's
on one thread; `engine.sampling.numba_sampler` makes the two longest of them one loop each.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Bools, Floats, Ints
from engine.batch.grammar_masks import GrammarMasks
from engine.batch.step_inputs import NO_INTS, RowEdits, SamplingInputs, TypicalInputs
from engine.sampling.acceptance import NO_TOKEN, NOT_FINITE
from engine.sampling.gumbel import GumbelRace
from engine.sampling.logit_processors import edit_logits
from engine.sampling.logprobs import ask_logprobs
from engine.sampling.noise import Words, noise_key
from engine.sampling.output import SamplerOutput
from engine.sampling.truncation import Limits, Nucleus, first_tokens, gaps_below, keep_first
from engine.sampling.typical import are_typical

FEW_TOKENS = 2048  # of a top-k: so many are listed and sorted; of more, only the last one is found


class HostSampler:
    """Samples on the host the rows of all requests of a step."""

    keeps_token_counts = False

    race_class: ClassVar[type[GumbelRace]] = GumbelRace

    def __init__(self, vocab_size: int, *, num_threads: int = 1) -> None:
        """num_threads: that a sampler may use; numpy's passes take one"""
        self.vocab_size = vocab_size
        self._race = self.race_class(vocab_size)

    def launch(self, logits: Tensor, inputs: SamplingInputs, newest: Tensor | None = None) -> SamplerOutput:
        """As `TokenSampler` says; waits for the logits, where they are computed elsewhere."""
        assert logits.ndim == 2, f"logits are rows of {self.vocab_size} tokens, not {tuple(logits.shape)}"
        assert logits.shape[1] == self.vocab_size, f"{logits.shape[1]} logits for {self.vocab_size} tokens"
        is_here = logits.device.type == "cpu"
        host: Floats = logits.numpy() if is_here else logits.cpu().numpy()
        before: Ints = NO_INTS if newest is None else newest.cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are dealt with where they matter
            tokens = self._sample(host, inputs, before)
            answers = None
            if inputs.logprobs is not None:
                after = inputs.logprobs.tokens.copy()
                after[inputs.logits_rows] = tokens.clip(0)
                answers = ask_logprobs(host, after, inputs.logprobs)
            is_typical = None if inputs.typical is None else self._typical(host, inputs, inputs.typical, before)
        sampled = torch.from_numpy(tokens)
        return SamplerOutput(sampled if is_here else sampled.to(logits.device), answers, is_typical)

    def _typical(self, logits: Floats, inputs: SamplingInputs, typical: TypicalInputs, newest: Ints) -> Tensor:
        rows = logits[inputs.logits_rows[typical.rows]]
        if inputs.masks is not None:
            _, places, of_masks = np.intersect1d(typical.rows, inputs.masks.rows, return_indices=True)
            forbidden = inputs.masks.forbidden(self.vocab_size)[of_masks]
            rows[places] = np.where(forbidden, np.float32(-np.inf), rows[places])
        for edit in inputs.edits:
            places = np.flatnonzero(typical.rows == edit.row)
            if len(places):
                rows[places[0]] = _edited(rows[places[0]], edit, newest)
        return are_typical(torch.from_numpy(rows), typical, inputs.facts)

    def _sample(self, logits: Floats, inputs: SamplingInputs, newest: Ints) -> Ints:
        """One token per sampled row, NO_TOKEN or NOT_FINITE where none can be chosen. [num_sampled]"""
        rows = inputs.logits_rows
        if not len(rows):
            return np.empty(0, dtype=np.int64)
        sampled = logits if len(rows) == len(logits) else logits[rows]
        if inputs.masks is None:
            return self._sample_rows(sampled, inputs, newest)
        masked, is_finite = self._mask(sampled, inputs.masks)
        tokens = self._sample_rows(masked, inputs, newest)
        of_masked = tokens[inputs.masks.rows]
        of_masked[of_masked == NOT_FINITE] = NO_TOKEN  # the mask, or what the request forbids, leaves none
        of_masked[~is_finite] = NOT_FINITE
        tokens[inputs.masks.rows] = of_masked
        return tokens

    def _mask(self, logits: Floats, masks: GrammarMasks) -> tuple[Floats, Bools]:
        """The rows with minus infinity where a grammar forbids a token; whether each masked row was finite before.

        logits: [num_sampled, vocab_size], which stay as they are
        """
        masked = logits.copy()
        peaks = logits[masks.rows].max(-1)  # not a number, if there is one
        masked[masks.rows] = np.where(masks.forbidden(self.vocab_size), np.float32(-np.inf), logits[masks.rows])
        is_finite: Bools = np.isfinite(peaks)
        return masked, is_finite

    def _sample_rows(self, logits: Floats, inputs: SamplingInputs, newest: Ints) -> Ints:
        """logits: [num_sampled, vocab_size]"""
        tokens = np.empty(len(logits), dtype=np.int64)
        self._decide(logits, range(len(logits)), tokens, inputs, newest)
        return tokens

    def _decide(
        self, logits: Floats, rows: Collection[int], tokens: Ints, inputs: SamplingInputs, newest: Ints
    ) -> None:
        """Fills in the tokens of some rows."""
        if not rows:
            return
        edits = {one.row: one for one in inputs.edits}
        temperatures = inputs.facts.temperatures
        # the lowest token id among equals; not a number, if there is one
        tokens[list(rows)] = (logits if len(rows) == len(logits) else logits[list(rows)]).argmax(-1)
        for i in rows:
            values = logits[i]
            if not np.isfinite(values[tokens[i]]):
                tokens[i] = NOT_FINITE
                continue
            edit = edits.get(i)
            if edit is not None:
                values = _edited(values, edit, newest)
                tokens[i] = values.argmax()
                if not np.isfinite(values[tokens[i]]):
                    tokens[i] = NO_TOKEN
                    continue
            if temperatures[i] > 0.0:
                tokens[i] = self._random(values, values[tokens[i]], inputs, i)

    def _random(self, logits: Floats, peak: np.float32, inputs: SamplingInputs, row: int) -> int:
        """The sampled token of a row with a temperature. logits: [vocab_size], the largest is `peak`"""
        facts = inputs.facts
        key = noise_key(int(facts.seeds[row]), int(inputs.positions[row]))
        gaps = gaps_below(peak, logits, facts.temperatures[row])
        limits = Limits(facts.max_gaps[row], int(facts.top_ks[row]), float(facts.top_ps[row]))
        if limits.top_k < self.vocab_size and limits.top_k <= FEW_TOKENS:
            tokens = first_tokens(gaps, limits)
            return self._race.winner_among(tokens, gaps[tokens], key)
        if limits.max_gap < np.inf:
            gaps[gaps > limits.max_gap] = np.inf
        if limits.top_k < self.vocab_size:
            keep_first(gaps, limits.top_k)
        winner = self._race.winner(gaps, key)
        return winner if limits.top_p >= 1.0 else self._inside(gaps, limits, winner, key)

    def _inside(self, gaps: Floats, limits: Limits, winner: int, key: Words) -> int:
        """The sampled token of the nucleus, given that of the whole row."""
        nucleus = Nucleus(gaps, limits.top_p, total=self._race.total_weight(gaps))
        before = nucleus.before(winner)
        while not nucleus.holds(before):
            winner = self._race.winner_among(before, gaps[before], key)
            before = nucleus.before(winner)
        return winner


def _edited(logits: Floats, edits: RowEdits, newest: Ints) -> Floats:
    """newest: what the step before sampled, by row"""
    values = logits.copy()
    edit_logits(values, edits)
    if edits.banned_after is not None:
        values[edits.banned_after[edits.banned_after[:, 0] == newest[edits.source], 1]] = -np.inf
    return values
