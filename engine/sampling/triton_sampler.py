"""The sampler of a GPU: the host's tokens (`.host_sampler`), decided without a word to the host in between.

A step is one to six launches: penalties, one index write per kind of bias or ban that somebody asks for, sampling, and
log-probabilities where wanted. What rows need goes up in one copy, and stays there while the sequences do
(`engine.sampling.device_columns`); what came of them goes down in another. In Triton's interpreter it runs on a CPU
too, slowly, for tests.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Ints
from engine.batch.device_inputs import to_device
from engine.batch.grammar_masks import GrammarMasks
from engine.batch.step_inputs import CountChanges, LogprobInputs, RowEdits, SamplingInputs
from engine.sampling.acceptance import NO_TOKEN, NOT_FINITE
from engine.sampling.device_columns import Columns
from engine.sampling.device_edits import DeviceEdits
from engine.sampling.output import SamplerOutput
from engine.sampling.token_counts import TokenCounts
from engine.sampling.typical import are_typical
from kernels.triton.sampling.grammar_masks import apply_masks
from kernels.triton.sampling.sample_tokens import sample_tokens
from kernels.triton.sampling.token_scores import penalise, score_tokens

_ROWS_PER_PASS = 64  # bounds the scratch memory of finding the most likely tokens: 100 MB at 150k tokens
_TOKEN_BITS = 32


class TritonSampler:
    """Samples by the kernels of `kernels.triton`, on the device of the logits."""

    keeps_token_counts = True

    def __init__(self, vocab_size: int, *, num_threads: int = 1) -> None:
        """num_threads: of the host, which has nothing to compute here"""
        self.vocab_size = vocab_size
        self._counts = TokenCounts(vocab_size)
        self._edits = DeviceEdits(vocab_size)
        self._columns: Columns | None = None

    @torch.inference_mode()
    def launch(self, logits: Tensor, inputs: SamplingInputs, newest: Tensor | None = None) -> SamplerOutput:
        """As `engine.sampling.sampler.TokenSampler` says."""
        assert logits.ndim == 2, f"logits are rows of {self.vocab_size} tokens, not {tuple(logits.shape)}"
        assert logits.shape[1] == self.vocab_size, f"{logits.shape[1]} logits for {self.vocab_size} tokens"
        rows = None if inputs.num_rows == len(logits) else to_device(inputs.logits_rows, logits.device)
        tokens, is_typical = self._sample(logits if rows is None else logits.index_select(0, rows), inputs, newest)
        queries = inputs.logprobs
        if queries is None:
            return SamplerOutput(tokens, None, is_typical)
        after = tokens.clamp_min(0)
        if rows is not None:
            after = to_device(queries.tokens, logits.device).index_copy_(0, rows, after)
        return SamplerOutput(tokens, _ask_logprobs(logits, after, queries), is_typical)

    def _sample(self, logits: Tensor, inputs: SamplingInputs, newest: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One token per sampled row, NO_TOKEN or NOT_FINITE where none can be chosen, [num_sampled] int64; and which
        drafts are typical, if that is asked."""
        if not inputs.num_rows:
            return torch.empty(0, dtype=torch.int64, device=logits.device), None
        facts = inputs.facts
        if self._columns is None or self._columns.facts is not facts:  # else only positions have changed
            self._columns = Columns(
                facts, inputs.positions, logits.device, vocab_size=self.vocab_size, before=self._columns
            )
        columns = self._columns
        if not inputs.edits and inputs.masks is None:
            tokens = _sample_by_columns(logits, columns, inputs.positions, none=NOT_FINITE)
            return tokens, _typical(logits, inputs)
        is_finite = logits.amax(-1).isfinite()
        edited = logits.clone()
        if inputs.masks is not None:
            self._mask(edited, inputs.masks)
        if inputs.counts is not None:
            self._penalise(edited, inputs.edits, inputs.counts, newest)
        if inputs.edits:
            self._edits.apply(edited, inputs.edits, newest)
        tokens = _sample_by_columns(edited, columns, inputs.positions, none=NO_TOKEN)
        return tokens.masked_fill_(~is_finite, NOT_FINITE), _typical(edited, inputs)

    def _mask(self, logits: Tensor, masks: GrammarMasks) -> None:
        """Waits for the masks while the model still computes, and queues their use. In place."""
        rows = to_device(masks.rows, logits.device)
        words = masks.words()
        padded = np.zeros((len(words), words.shape[1] + words.shape[1] % 2), dtype=np.uint32)  # whole int64s
        padded[:, : words.shape[1]] = words
        there = to_device(padded.view(np.int64), logits.device)
        apply_masks(logits, rows, there.view(torch.int32))

    def _penalise(
        self, logits: Tensor, edits: tuple[RowEdits, ...], changes: CountChanges, newest: Tensor | None
    ) -> None:
        states = self._counts.change(changes, newest, logits.device)
        num_rows = len(logits)
        columns = np.zeros((3, num_rows + num_rows % 2))  # each at a multiple of 16 bytes
        columns[0] = 1.0
        for one in edits:
            if one.penalties is not None:
                columns[:, one.row] = one.penalties.repetition, one.penalties.frequency, one.penalties.presence
        repetition, frequency, presence = to_device(columns, logits.device)[:, :num_rows].unbind()
        penalise(
            logits, self._counts.counts, self._counts.is_in_prompt, states, repetition.float(), frequency, presence
        )


def _sample_by_columns(logits: Tensor, columns: Columns, positions: Ints, *, none: int) -> Tensor:
    """One token per row of the columns, `none` where the largest of its logits is not finite. [num_rows] int64"""
    tokens: Tensor = sample_tokens(
        logits, *columns.at(positions), none=none, is_random=columns.is_random, is_truncated=columns.is_truncated
    )
    return tokens


def _typical(logits: Tensor, inputs: SamplingInputs) -> Tensor | None:
    """logits: of the sampled rows, edited"""
    if inputs.typical is None:
        return None
    return are_typical(logits[to_device(inputs.typical.rows, logits.device)], inputs.typical, inputs.facts)


def _ask_logprobs(logits: Tensor, token_ids: Tensor, queries: LogprobInputs) -> Tensor:
    """What `engine.sampling.logprobs.ask_logprobs` tells, from the device. [num_queries, 3 + 2 * num_top] float64

    logits: [num_rows, vocab_size]; token_ids: [num_rows]
    """
    if len(queries.rows) < len(logits):
        places = to_device(queries.rows, logits.device)
        logits, token_ids = logits.index_select(0, places), token_ids.index_select(0, places)
    num_top = min(logits.shape[1], int(queries.num_top.max()))
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
