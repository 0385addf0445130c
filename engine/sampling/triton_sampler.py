"""The sampler of a GPU: the host's tokens (`engine.sampling.sampler`), decided without a word to the host in between.

A step is one to six launches: penalties, one index write per kind of bias or ban that somebody asks for, sampling, and
log-probabilities where wanted. What rows need goes up in one copy, and stays there while the sequences do
(`engine.sampling.metadata`); what came of them goes down in another. In Triton's interpreter it runs on a CPU too,
slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Ints
from engine.batch.transfer import to_device
from engine.sampling.acceptance import NO_TOKEN, NOT_FINITE
from engine.sampling.device_edits import DeviceLogitEdits
from engine.sampling.logprobs import LogprobQuery, logprob_queries, scored_tokens
from engine.sampling.metadata import Columns
from engine.sampling.output import Pending
from engine.sampling.rows import SampledRow, is_penalised, sampled_places, sampled_rows
from engine.sampling.token_counts import TokenCounts
from engine.types import Sampled, Scheduled, Sequence
from kernels.triton.sampling.sample_tokens import sample_tokens
from kernels.triton.sampling.token_scores import penalise, score_tokens

_ROWS_PER_PASS = 64  # bounds the scratch memory of finding the most likely tokens: 100 MB at 150k tokens
_TOKEN_BITS = 32


class TritonSampler:
    """Samples by the kernels of `kernels.triton`, on the device of the logits."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._counts = TokenCounts(vocab_size)
        self._edits = DeviceLogitEdits(vocab_size)
        self._columns: Columns | None = None
        self._plain_batch: list[Scheduled] | None = None  # of the last step, if it asked for no log-probabilities

    def __call__(self, logits: Tensor, batch: list[Scheduled]) -> list[Sampled]:
        """As `engine.sampling.sampler.TokenSampler` says."""
        return self.launch(logits, batch).finish()

    @torch.inference_mode()
    def launch(self, logits: Tensor, batch: list[Scheduled], positions: Ints | None = None) -> Pending:
        """As `engine.sampling.sampler.TokenSampler` says."""
        if positions is not None and self._is_as_before(batch, positions):
            assert logits.shape == (len(batch), self.vocab_size), f"{tuple(logits.shape)} logits for {len(batch)} rows"
            tokens = self._sample_by_columns(logits, positions, none=NOT_FINITE)
            return Pending(batch, tokens, [], None, positions)
        self._plain_batch = None
        seqs, row_positions = sampled_places(batch, positions)
        queries = logprob_queries(batch)
        num_rows = len(seqs) + sum([item.num_scored for item in batch])
        assert logits.shape == (num_rows, self.vocab_size), f"{tuple(logits.shape)} logits for {num_rows} rows"
        places = None  # of the sampled rows: all rows
        if len(seqs) < num_rows:
            rows = sampled_rows(batch, positions)
            places = to_device(np.array([row.logits_row for row in rows], dtype=np.int64), logits.device)
        sampled = logits if places is None else logits.index_select(0, places)
        tokens = self._sample(sampled, seqs, row_positions, lambda: sampled_rows(batch, positions))
        answers = None
        if queries:
            after = tokens.clamp_min(0)
            if places is not None:
                after = to_device(scored_tokens(batch), logits.device).index_copy_(0, places, after)
            answers = _ask_logprobs(logits, after, queries)
        else:
            self._plain_batch = batch
        return Pending(batch, tokens, queries, answers, positions)

    def _is_as_before(self, batch: list[Scheduled], positions: Ints) -> bool:
        """Whether the step is of the same items as the last one, none of which asks for more than a token now."""
        columns = self._columns
        return columns is not None and batch is self._plain_batch and not columns.edit_logits(positions)

    def _sample_by_columns(self, logits: Tensor, positions: Ints, *, none: int) -> Tensor:
        """One token per row of the columns, `none` where the largest of its logits is not finite. [num_rows] int64"""
        columns = self._columns
        assert columns is not None
        tokens: Tensor = sample_tokens(
            logits,
            *columns.at(positions),
            none=none,
            is_random=columns.is_random,
            is_truncated=columns.is_truncated,
        )
        return tokens

    def _sample(
        self, logits: Tensor, seqs: list[Sequence], positions: Ints, read_rows: Callable[[], list[SampledRow]]
    ) -> Tensor:
        """One token per row, NO_TOKEN or NOT_FINITE where none can be chosen. [num_rows] int64

        seqs, positions: of each row; read_rows: all that there is to know of them, which only edits need
        """
        if not seqs:
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        if self._columns is None or seqs != self._columns.seqs:  # else only positions have changed
            self._columns = Columns(seqs, positions, logits.device, vocab_size=self.vocab_size, before=self._columns)
        if not self._columns.edit_logits(positions):
            return self._sample_by_columns(logits, positions, none=NOT_FINITE)
        rows = read_rows()
        is_finite = logits.amax(-1).isfinite()
        edited = logits.clone()
        if any(is_penalised(row.params) for row in rows):
            self._penalise(edited, rows)
        self._edits.apply(edited, rows)
        tokens = self._sample_by_columns(edited, positions, none=NO_TOKEN)
        return tokens.masked_fill_(~is_finite, NOT_FINITE)

    def _penalise(self, logits: Tensor, rows: list[SampledRow]) -> None:
        states = self._counts.states(rows, logits.device)
        params = [row.params for row in rows]
        columns = np.zeros((3, len(rows) + len(rows) % 2))  # each at a multiple of 16 bytes
        columns[:, : len(rows)] = [
            [one.repetition_penalty for one in params],
            [one.frequency_penalty for one in params],
            [one.presence_penalty for one in params],
        ]
        repetition, frequency, presence = to_device(columns, logits.device)[:, : len(rows)].unbind()
        penalise(
            logits, self._counts.counts, self._counts.is_in_prompt, states, repetition.float(), frequency, presence
        )


def _ask_logprobs(logits: Tensor, token_ids: Tensor, queries: list[LogprobQuery]) -> Tensor:
    """What `engine.sampling.logprobs.ask_logprobs` tells, from the device. [num_queries, 3 + 2 * num_top] float64

    logits: [num_rows, vocab_size]; token_ids: [num_rows]
    """
    if len(queries) < len(logits):
        places = to_device(np.array([query.row for query in queries], dtype=np.int64), logits.device)
        logits, token_ids = logits.index_select(0, places), token_ids.index_select(0, places)
    num_top = min(logits.shape[1], max(query.num_top for query in queries))
    logprobs, ranks = score_tokens(logits, token_ids)
    columns = [token_ids[:, None].double(), ranks[:, None].double(), logprobs[:, None]]
    if num_top:
        columns += _most_likely(logits, num_top)
    return torch.cat(columns, dim=1)


def _most_likely(logits: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids of the first tokens in the order (gap, token id). [num_rows, num_top] float64 each"""
    parts = [
        _first_keys(logits[start : start + _ROWS_PER_PASS], num_top) for start in range(0, len(logits), _ROWS_PER_PASS)
    ]
    keys = torch.cat(parts)
    tokens = keys & ((1 << _TOKEN_BITS) - 1)
    gaps = (keys >> _TOKEN_BITS).int().view(torch.float32)
    best, _ = score_tokens(logits, tokens[:, 0].contiguous())  # whose gap is 0: minus the logarithm of the total
    return best[:, None] - gaps, tokens.double()


def _first_keys(logits: Tensor, num_top: int) -> Tensor:
    """Floats that are not negative sort as their bits do: one integer holds the gap above the token id."""
    gaps = logits.amax(-1, keepdim=True) + 0.0 - logits  # a best of -0.0 would make gaps of -0.0
    tokens = torch.arange(logits.shape[1], device=logits.device)
    keys = (gaps.view(torch.int32).long() << _TOKEN_BITS) | tokens
    return keys.topk(num_top, largest=False, sorted=True).values
