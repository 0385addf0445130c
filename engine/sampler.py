"""Turns logits into tokens. Sampling is verification: ordinary sampling is the case of zero drafts.

Every row is sampled from the target model with noise that depends on the seed, the position and the token id alone
(`engine.noise`). A draft is right when it is the token that would have been sampled anyway, so drafts change the
speed of a request and never its output, and neither does what else is in the batch.

The order of operations is vLLM's from the temperature on:

    raw logits -> [log-probabilities]
      -> penalties, bias, bans             engine.penalties
      -> temperature                       here
      -> min-p -> top-k -> top-p           engine.truncation, engine.nucleus
      -> largest of noise + logit          engine.gumbel
      -> walk down the drafts              engine.acceptance

Greedy rows take the largest logit after the bans. A temperature below 1e-5 is greedy.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from torch import Tensor

from engine.acceptance import NO_TOKEN, accept
from engine.candidates import gaps_below_best
from engine.gumbel import float_weights, largest_score, largest_score_listed
from engine.logprobs import LogprobQuery, token_logprobs
from engine.noise import noise_keys, token_words
from engine.nucleus import largest_score_in_nucleus
from engine.penalties import edit_logits, edits_logits
from engine.sampled_rows import IntArray, SampledRows, sampled_rows
from engine.truncation import Limits, is_kept_sorted, truncated_list
from engine.types import Sampled, Scheduled

_MAX_LISTED = 1024  # a larger top_k goes by sorting
_GREEDY_BELOW = 1e-5  # the noise, at most 22, could not reverse a difference of 3e-4 between logits

_NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity) at position {position}, so no token can be chosen; "
    "this prompt overflows the model's arithmetic: try dtype float32 or bfloat16"
)
_NOTHING_ALLOWED = (
    "no token is allowed at position {position}: allowed_token_ids, bad_words, logit_bias and min_tokens together "
    "exclude the whole vocabulary; loosen one of them"
)


class Sampler:
    """Samples the rows of all requests of a step together. Keeps no state about requests."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._words = token_words(vocab_size, torch.device("cpu"))

    @torch.inference_mode()
    def __call__(self, logits: Tensor, batch: list[Scheduled]) -> list[Sampled]:
        """Decides the tokens of every item, one `Sampled` each. The logits stay as they are.

        logits: [sum of num_logits, vocab_size] float32. A request for which nothing can be sampled gets an error of
        its own; no request can make this raise.
        """
        num_rows = sum(item.num_logits for item in batch)
        assert logits.shape == (num_rows, self.vocab_size), f"{tuple(logits.shape)} logits for {num_rows} rows"
        if not num_rows:
            return [Sampled([]) for _ in batch]
        rows = sampled_rows(batch)
        is_finite = logits.amax(-1).isfinite()
        tokens = self._sample(logits, rows)
        # The one copy to the host (log-probabilities, where asked for, are another).
        answers = torch.cat((is_finite.long(), tokens)).tolist()
        results = _walk(batch, rows, is_finite=answers[:num_rows], tokens=answers[num_rows:])
        _add_logprobs(logits, batch, results)
        return results

    def _sample(self, logits: Tensor, rows: SampledRows) -> Tensor:
        """One token per sampled row, NO_TOKEN where none can be chosen. [num_sampled_rows] int64"""
        logits = _select(logits, rows.logits_rows)
        if any(edits_logits(item) for item in rows.items):
            logits = logits.clone()
            edit_logits(logits, rows)
        temperatures = rows.per_row([params.temperature for params in rows.params])
        is_random = temperatures >= _GREEDY_BELOW
        peaks = logits.amax(-1)
        tokens = torch.empty(len(temperatures), dtype=torch.int64, device=logits.device)
        for kind, choose in ((np.flatnonzero(~is_random), _greedy), (np.flatnonzero(is_random), self._random)):
            if len(kind):
                _put(tokens, kind, choose(_select(logits, kind), _select(peaks, kind), rows, kind))
        return tokens.masked_fill_(~peaks.isfinite(), NO_TOKEN)

    def _random(self, logits: Tensor, peaks: Tensor, rows: SampledRows, kind: IntArray) -> Tensor:
        """The sampled token of rows with a temperature. kind: [num_rows] which of the sampled rows these are"""
        device = logits.device
        gaps = _gaps(logits, peaks, rows, kind)
        keys = noise_keys(rows.seeds[kind], rows.positions[kind], device)
        limits, ways = self._limits(rows, kind, device)
        words = self._words = self._words.to(device)
        tokens = torch.empty(len(kind), dtype=torch.int64, device=device)
        for way, sample in _WAYS.items():
            chosen = np.flatnonzero(ways == way)
            if len(chosen):
                some = limits.select(torch.from_numpy(chosen).to(device))
                _put(tokens, chosen, sample(_select(gaps, chosen), _select(keys, chosen), words, some))
        return tokens

    def _limits(self, rows: SampledRows, kind: IntArray, device: torch.device) -> tuple[Limits, IntArray]:
        """What the rows `kind` of the sampled rows keep, and which of _WAYS suits each. [num_rows]"""
        asked_k = rows.per_row([params.top_k for params in rows.params])[kind].astype(np.int64)
        is_cut = (asked_k >= 1) & (asked_k < self.vocab_size)
        top_k = np.where(is_cut, asked_k, self.vocab_size)
        top_p = rows.per_row([params.top_p for params in rows.params])[kind]
        min_p = rows.per_row([params.min_p for params in rows.params])[kind]
        with np.errstate(divide="ignore"):
            max_gap = -np.log(min_p).astype(np.float32)  # infinite where min-p is off
        columns = (torch.from_numpy(column[:, None]).to(device) for column in (max_gap, top_k, top_p))
        is_whole = ~is_cut & (top_p >= 1.0) & (min_p <= 0.0)
        ways = np.where(is_whole, _WHOLE, np.where(~is_cut, _NUCLEUS, np.where(top_k <= _MAX_LISTED, _LIST, _SORT)))
        return Limits(*columns), ways


def _sample_whole(gaps: Tensor, keys: Tensor, words: Tensor, limits: Limits) -> Tensor:
    return largest_score(gaps, float_weights(gaps), keys, words)


def _sample_list(gaps: Tensor, keys: Tensor, words: Tensor, limits: Limits) -> Tensor:
    return largest_score_listed(*truncated_list(gaps, limits), keys, words)


def _sample_sorted(gaps: Tensor, keys: Tensor, words: Tensor, limits: Limits) -> Tensor:
    weights = float_weights(gaps) * is_kept_sorted(gaps, limits)
    return largest_score(gaps, weights, keys, words)


_WHOLE, _NUCLEUS, _LIST, _SORT = range(4)
_WAYS = {_WHOLE: _sample_whole, _NUCLEUS: largest_score_in_nucleus, _LIST: _sample_list, _SORT: _sample_sorted}


def _greedy(logits: Tensor, peaks: Tensor, rows: SampledRows, kind: IntArray) -> Tensor:
    return logits.argmax(-1)  # the lowest token id among equals


def _gaps(logits: Tensor, peaks: Tensor, rows: SampledRows, kind: IntArray) -> Tensor:
    """How far each logit lies below its row's largest, in units of the temperature.

    Rows without a finite largest logit become rows that allow token 0 alone: what is sampled there is not used.
    """
    temperatures = rows.per_row([params.temperature for params in rows.params])[kind].astype(np.float32)
    gaps = gaps_below_best(logits, peaks[:, None]).div_(torch.from_numpy(temperatures).to(logits.device)[:, None])
    unusable = (~peaks.isfinite()).nonzero()[:, 0]
    if len(unusable):
        gaps[unusable] = torch.inf
        gaps[unusable, 0] = 0.0
    return gaps


def _walk(batch: list[Scheduled], rows: SampledRows, *, is_finite: list[int], tokens: list[int]) -> list[Sampled]:
    """Accepts drafts and finds the requests that cannot go on."""
    results: list[Sampled] = []
    first_logits, first_row = 0, 0
    for item in batch:
        root = first_logits + item.num_scored
        sampled = tokens[first_row : first_row + item.num_sampled_rows]
        first_row += item.num_sampled_rows
        needed = is_finite[first_logits : root + 1] if item.samples else is_finite[first_logits:root]
        first_logits += item.num_logits
        if not all(needed):
            results.append(Sampled([], error=_NOT_FINITE.format(position=item.seq.num_tokens)))
        elif not item.samples:
            results.append(Sampled([]))
        elif sampled[0] == NO_TOKEN:
            results.append(Sampled([], error=_NOTHING_ALLOWED.format(position=item.seq.num_tokens)))
        else:
            accepted = accept(sampled, item)
            token_ids = [sampled[0], *(sampled[draft + 1] for draft in accepted)]
            results.append(Sampled(token_ids, accepted))
    return results


def _add_logprobs(logits: Tensor, batch: list[Scheduled], results: list[Sampled]) -> None:
    """Fills in the log-probabilities that requests asked for: of scored prompt tokens, then of emitted tokens."""
    queries: list[LogprobQuery] = []
    asking: list[tuple[Scheduled, Sampled]] = []
    first = 0
    for item, result in zip(batch, results, strict=True):
        if not result.error and (item.num_scored or item.seq.params.logprobs is not None):
            queries += _queries(item, result, first)
            asking.append((item, result))
        first += item.num_logits
    answers = token_logprobs(logits, queries)
    for item, result in asking:
        result.prompt_logprobs = list(islice(answers, item.num_scored)) or None
        if item.seq.params.logprobs is not None:
            result.logprobs = list(islice(answers, len(result.token_ids))) or None


def _queries(item: Scheduled, result: Sampled, first: int) -> list[LogprobQuery]:
    """first: the item's first row in the logits, which stands at its num_logits-th last new token."""
    seq, params = item.seq, item.seq.params
    next_index = seq.num_computed_tokens + item.num_new_tokens - item.num_logits + 1
    scored = seq.token_ids[next_index : next_index + item.num_scored]
    queries = [LogprobQuery(first + i, token_id, params.prompt_logprobs or 0) for i, token_id in enumerate(scored)]
    if params.logprobs is not None and result.token_ids:
        emitted_rows = [0, *(draft + 1 for draft in result.accepted)]
        for row, token_id in zip(emitted_rows, result.token_ids, strict=True):
            queries.append(LogprobQuery(first + item.num_scored + row, token_id, params.logprobs))
    return queries


def _select(values: Tensor, rows: IntArray) -> Tensor:
    """Some rows, in ascending order; the tensor itself where that is all of them."""
    if len(rows) == values.shape[0]:
        return values
    return values.index_select(0, torch.from_numpy(rows).to(values.device))


def _put(values: Tensor, rows: IntArray, some: Tensor) -> None:
    values[torch.from_numpy(rows).to(values.device)] = some
