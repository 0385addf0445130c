"""The sampler of a CPU: row after row with numpy, whose passes over a vocabulary take a third to a fifteenth of torch's
on one thread; `engine.sampling.numba_sampler` makes the two longest of them one loop each.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Floats, Ints
from engine.sampling.acceptance import NO_TOKEN, NOT_FINITE
from engine.sampling.gumbel import GumbelRace
from engine.sampling.logit_processors import LogitEditsOfSequences, bias_and_ban, edits_logits, penalise
from engine.sampling.logprobs import ask_logprobs, logprob_queries, scored_tokens
from engine.sampling.noise import Words, noise_key
from engine.sampling.output import Pending
from engine.sampling.rows import SampledRow, is_penalised, sampled_rows
from engine.sampling.sampler import GREEDY_BELOW
from engine.sampling.token_counts import TokenHistories
from engine.sampling.truncation import Limits, Nucleus, first_tokens, gaps_below, keep_first, limits_of
from engine.types import Sampled, Scheduled

FEW_TOKENS = 2048  # of a top-k: so many are listed and sorted; of more, only the last one is found


class HostSampler:
    """Samples on the host the rows of all requests of a step."""

    def __init__(self, vocab_size: int, race: GumbelRace | None = None) -> None:
        self.vocab_size = vocab_size
        self._race = race or GumbelRace(vocab_size)
        self._histories = TokenHistories()
        self._edits = LogitEditsOfSequences(vocab_size)

    def __call__(self, logits: Tensor, batch: list[Scheduled]) -> list[Sampled]:
        """As `TokenSampler` says."""
        return self.launch(logits, batch).finish()

    def launch(self, logits: Tensor, batch: list[Scheduled], positions: Ints | None = None) -> Pending:
        """As `TokenSampler` says; waits for the logits, where they are computed elsewhere."""
        num_rows = sum([item.num_logits for item in batch])
        assert logits.shape == (num_rows, self.vocab_size), f"{tuple(logits.shape)} logits for {num_rows} rows"
        host: Floats = logits.cpu().numpy()
        rows = sampled_rows(batch, positions)
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are dealt with where they matter
            tokens = self._sample(host, rows)
            queries = logprob_queries(batch)
            answers = None
            if queries:
                after = scored_tokens(batch)
                after[[row.logits_row for row in rows]] = tokens.clip(0)
                answers = ask_logprobs(host, after, queries)
        return Pending(batch, torch.from_numpy(tokens).to(logits.device), queries, answers, positions)

    def _sample(self, logits: Floats, rows: Listing[SampledRow]) -> Ints:
        """One token per sampled row, NO_TOKEN or NOT_FINITE where none can be chosen. [num_sampled_rows]"""
        chosen = logits if len(rows) == len(logits) else logits[[row.logits_row for row in rows]]
        if not len(rows):
            return np.empty(0, dtype=np.int64)
        tokens: Ints = chosen.argmax(-1)  # the lowest token id among equals; not a number, if there is one
        for i, row in enumerate(rows):
            values = chosen[i]
            if not np.isfinite(values[tokens[i]]):
                tokens[i] = NOT_FINITE
                continue
            if edits_logits(row):
                values = self._edited(values, row)
                tokens[i] = values.argmax()
                if not np.isfinite(values[tokens[i]]):
                    tokens[i] = NO_TOKEN
                    continue
            if row.params.temperature >= GREEDY_BELOW:
                tokens[i] = self._random(values, values[tokens[i]], row)
        return tokens

    def _edited(self, logits: Floats, row: SampledRow) -> Floats:
        values = logits.copy()
        if is_penalised(row.params):
            penalise(values, row, self._histories.of(row.item.seq))
        bias_and_ban(values, row, self._edits.of(row.item.seq))
        return values

    def _random(self, logits: Floats, peak: np.float32, row: SampledRow) -> int:
        """The sampled token of a row with a temperature. logits: [vocab_size], the largest is `peak`"""
        params = row.params
        key = noise_key(params.seed, row.position)
        gaps = gaps_below(peak, logits, np.float32(params.temperature))
        limits = limits_of(params, self.vocab_size)
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
