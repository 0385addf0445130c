"""The sampler of a GPU: the host's tokens (`engine.sampler`), decided without a word to the host in between.

A step is four to six launches: penalties, one index write per kind of bias or ban that somebody asks for, sampling, and
log-probabilities where wanted. What a row needs goes up in one copy, what came of it down in another. In Triton's
interpreter it runs on a CPU too, slowly, for tests.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.acceptance import NOT_FINITE
from engine.candidates import Ints
from engine.logit_edits import bias_and_ban_rows
from engine.logprobs import LogprobQuery, logprob_queries, scored_tokens
from engine.noise import Words, noise_keys
from engine.penalties import edits_every_step, is_penalised
from engine.pending import Pending
from engine.sampled_rows import SampledRow, sampled_rows
from engine.sampler import GREEDY_BELOW
from engine.token_counts import TokenCounts
from engine.transfer import to_device
from engine.truncation import limits_of
from engine.types import Sampled, Scheduled, Sequence
from kernels.triton.sampling import sample_tokens
from kernels.triton.token_scores import penalise, score_tokens

_SEED = (1 << 64) - 1
_ROWS_PER_PASS = 64  # bounds the scratch memory of finding the most likely tokens: 100 MB at 150k tokens
_TOKEN_BITS = 32
_KEYS_AT_ONCE = 1024  # of all rows, for at least _MIN_STEPS steps: most of the work for a few keys is Python's
_MIN_STEPS = 16


class TritonSampler:
    """Samples by the kernels of `kernels.triton`, on the device of the logits."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._counts = TokenCounts(vocab_size)
        self._columns: _Columns | None = None
        self._plain_batch: list[Scheduled] | None = None  # of the last step, if it asked for no log-probabilities

    def __call__(self, logits: Tensor, batch: list[Scheduled]) -> list[Sampled]:
        """As `engine.sampler.TokenSampler` says."""
        return self.launch(logits, batch).finish()

    @torch.inference_mode()
    def launch(self, logits: Tensor, batch: list[Scheduled], positions: Ints | None = None) -> Pending:
        """As `engine.sampler.TokenSampler` says."""
        if positions is not None and self._is_as_before(batch, positions):
            assert logits.shape == (len(batch), self.vocab_size), f"{tuple(logits.shape)} logits for {len(batch)} rows"
            tokens = self._sample_unedited(logits, positions)
            return Pending(batch, tokens, [], None, positions)
        num_rows = sum([item.num_logits for item in batch])
        assert logits.shape == (num_rows, self.vocab_size), f"{tuple(logits.shape)} logits for {num_rows} rows"
        rows = sampled_rows(batch, None if positions is None else positions.tolist())
        places = None  # of the sampled rows: all rows
        if len(rows) < num_rows:
            places = to_device(np.array([row.logits_row for row in rows], dtype=np.int64), logits.device)
        tokens = self._sample(logits if places is None else logits.index_select(0, places), rows)
        queries = logprob_queries(batch)
        self._plain_batch = None if queries else batch
        answers = None
        if queries:
            after = tokens.clamp_min(0)
            if places is not None:
                after = to_device(scored_tokens(batch), logits.device).index_copy_(0, places, after)
            answers = _ask_logprobs(logits, after, queries)
        return Pending(batch, tokens, queries, answers, positions)

    def _is_as_before(self, batch: list[Scheduled], positions: Ints) -> bool:
        """Whether the step is of the same items as the last one, none of which asks for more than a token now."""
        columns = self._columns
        return columns is not None and batch is self._plain_batch and not columns.edit_logits(positions)

    def _sample_unedited(self, logits: Tensor, positions: Ints) -> Tensor:
        """One token per row, NOT_FINITE where the largest of its logits is not. [num_rows] int64"""
        assert self._columns is not None
        tokens: Tensor = sample_tokens(logits, *self._columns.at(positions), none=NOT_FINITE)
        return tokens

    def _sample(self, logits: Tensor, rows: list[SampledRow]) -> Tensor:
        """One token per row, NO_TOKEN or NOT_FINITE where none can be chosen. [num_rows] int64"""
        if not rows:
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        seqs = [row.item.seq for row in rows]
        positions = np.array([row.position for row in rows], dtype=np.int64)
        if self._columns is None or seqs != self._columns.seqs:  # else only positions have changed
            self._columns = _Columns(
                seqs, positions, logits.device, vocab_size=self.vocab_size, before=self._columns
            )  # fmt: skip
        if not self._columns.edit_logits(positions):
            return self._sample_unedited(logits, positions)
        is_finite = logits.amax(-1).isfinite()
        edited = logits.clone()
        if any(is_penalised(row.params) for row in rows):
            self._penalise(edited, rows)
        bias_and_ban_rows(edited, rows)
        tokens: Tensor = sample_tokens(edited, *self._columns.at(positions))
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


class _Columns:
    """What the kernel needs to know of each row, on the device. Only the noise keys change from step to step.

    It goes there as one array of 8-byte words, four a row, so that it is one copy:

        [ top_ps | top_ks | keys, two 32-bit words | temperatures, then max_gaps, float32 ]

    Each is filled up to four rows: Triton compiles a kernel once more for addresses that are no multiples of 16 bytes.
    """

    def __init__(
        self, seqs: list[Sequence], positions: Ints, device: torch.device, *, vocab_size: int, before: _Columns | None
    ) -> None:
        """seqs: the sequence of each row; before: the columns of the step before, with most of the same sequences"""
        self.seqs = seqs
        self._device = device
        self._known: dict[Sequence, _Facts] = {}
        known = {} if before is None else before._known
        for seq in seqs:
            if seq not in self._known:
                self._known[seq] = known.get(seq) or _read_facts(seq, vocab_size)
        facts = [self._known[seq] for seq in seqs]
        numbers = np.array([one.numbers for one in facts], dtype=np.float64).T
        self._seeds = np.array([one.seed for one in facts], dtype=np.uint64)
        self._edits_before: NDArray[np.float64] | None = numbers[4] if numbers[4].any() else None
        num_rows = len(seqs)
        words = np.zeros((4, num_rows + -num_rows % 4), dtype=np.int64)
        words[0, :num_rows] = numbers[0].copy().view(np.int64)
        words[1, :num_rows] = numbers[1]
        words[2, :num_rows] = _pack(noise_keys(self._seeds, positions))
        words[3].view(np.float32).reshape(2, -1)[:, :num_rows] = numbers[2:4]
        there = to_device(words, device)
        top_ps, self._top_ks = there[:2, :num_rows].unbind()
        self._top_ps = top_ps.view(torch.float64)
        self._temperatures, self._max_gaps = there[3].view(torch.float32).view(2, -1)[:, :num_rows].unbind()
        self._first = positions  # of the first of the keys
        self._keys = self._as_keys(there[2:3])  # of one step, and once the sequences have stayed, of many

    def at(self, positions: Ints) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Temperatures, keys, max_gaps, top_ks and top_ps as `sample_tokens` takes them. positions: [num_rows]"""
        return self._temperatures, self._keys_at(positions), self._max_gaps, self._top_ks, self._top_ps

    def edit_logits(self, positions: Ints) -> bool:
        """Whether any row's request changes any logit in this step."""
        return self._edits_before is not None and bool((positions < self._edits_before).any())

    def _keys_at(self, positions: Ints) -> Tensor:
        step = int(positions[0] - self._first[0])
        if 0 <= step < len(self._keys) and np.array_equal(self._first + step, positions):
            return self._keys[step]
        # Where there are drafts, nobody knows the next positions.
        num_rows = len(positions)
        num_steps = max(_MIN_STEPS, _KEYS_AT_ONCE // num_rows)
        if any(seq.draft_token_ids for seq in self.seqs):
            num_steps = 1
        ahead = (positions + np.arange(num_steps)[:, None]).reshape(-1)
        keys = np.zeros((num_steps, num_rows + -num_rows % 4), dtype=np.int64)
        keys[:, :num_rows] = _pack(noise_keys(np.tile(self._seeds, num_steps), ahead)).reshape(num_steps, -1)
        self._first, self._keys = positions, self._as_keys(to_device(keys, self._device))
        return self._keys[0]

    def _as_keys(self, words: Tensor) -> tuple[Tensor, ...]:
        """Of each step [num_rows, 2] int32. words: [num_steps, num_rows, filled up] int64"""
        return words.view(torch.int32).view(len(words), -1, 2)[:, : len(self.seqs)].unbind()


class _Facts(NamedTuple):
    """What the kernel needs to know of a sequence, and never changes."""

    seed: int
    numbers: tuple[float, float, float, float, float]  # top_p, top_k, temperature, max_gap, edits before position


def _read_facts(seq: Sequence, vocab_size: int) -> _Facts:
    params, limits = seq.params, limits_of(seq.params, vocab_size)
    temperature = params.temperature if params.temperature >= GREEDY_BELOW else 0.0
    edits_before = 0.0
    if edits_every_step(params):
        edits_before = math.inf
    elif params.min_tokens:
        edits_before = float(seq.num_prompt_tokens + params.min_tokens)
    numbers = limits.top_p, limits.top_k, temperature, float(limits.max_gap), edits_before
    return _Facts(params.seed & _SEED, numbers)


def _pack(keys: Words) -> Ints:
    """keys: [num_rows, 2]; returns [num_rows]"""
    return keys.reshape(-1).view(np.int64)


def _ask_logprobs(logits: Tensor, token_ids: Tensor, queries: list[LogprobQuery]) -> Tensor:
    """What `engine.logprobs.ask_logprobs` tells, from the device. [num_queries, 3 + 2 * num_top] float64

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
