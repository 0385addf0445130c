"""Changes to the logits that a request asks for: penalties, bias and bans.

Applied in this order, each to what the one before left:

1. repetition penalty, over the tokens of prompt and output: a positive logit is divided by it, a negative one
   multiplied (Keskar et al. 2019, "CTRL", section 4.1, with the sign handled as all servers do);
2. frequency penalty times the number of occurrences, plus presence penalty, over the output, subtracted;
3. logit bias, added;
4. bans: every token but the allowed ones, the last token of a bad word whose other tokens have just been written
   (the end of the prompt counts), stop tokens before min_tokens.

For a row behind drafts, the drafts on its path count as output. All edits are sparse: lists of (row, token, value) are
made on the host and applied to the rows of all requests at once. An entry may occur twice: results are assigned, so
both write the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from engine.sampled_rows import FloatArray, IntArray, SampledRows, draft_paths
from engine.types import SamplingParams, Scheduled


def edits_logits(item: Scheduled) -> bool:
    """Whether a request may change any logit in this step."""
    params = item.seq.params
    return bool(
        _penalizes_output(params)
        or params.repetition_penalty != 1.0
        or params.logit_bias
        or params.allowed_token_ids is not None
        or params.bad_words
        or params.min_tokens > item.seq.num_output_tokens
    )


def edit_logits(logits: Tensor, rows: SampledRows) -> None:
    """Applies what the rows' requests ask for, in place. logits: [num_rows, vocab_size], one row per sampled row"""
    _apply_repetition_penalty(logits, rows)
    _apply_output_penalties(logits, rows)
    _apply_logit_bias(logits, rows)
    _keep_allowed_tokens(logits, rows)
    _ban_tokens(logits, rows)


def _penalizes_output(params: SamplingParams) -> bool:
    return params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _apply_repetition_penalty(logits: Tensor, rows: SampledRows) -> None:
    places = _Places()
    for first_row, item in _items(rows, lambda params: params.repetition_penalty != 1.0):
        places.add_history(first_row, item, np.array(item.seq.token_ids))
    if places:
        row, token = places.arrays()
        penalty = _on_device(rows.per_row([params.repetition_penalty for params in rows.params])[row], logits)
        found = logits[_indices(row, token, logits)]
        penalized = torch.where(found > 0, found / penalty, found * penalty)
        penalized.clamp_max_(torch.finfo(torch.float32).max)  # a penalty near 0 may overflow
        logits[_indices(row, token, logits)] = penalized


def _apply_output_penalties(logits: Tensor, rows: SampledRows) -> None:
    places = _Places()
    for first_row, item in _items(rows, _penalizes_output):
        output = np.array(item.seq.token_ids[item.seq.num_prompt_tokens :], dtype=np.int64)
        places.add_history(first_row, item, output)
    if places:
        frequency = rows.per_row([params.frequency_penalty for params in rows.params])
        presence = rows.per_row([params.presence_penalty for params in rows.params])
        row, token, count = places.count()
        _add(logits, row, token, -(frequency[row] * count + presence[row]))


def _apply_logit_bias(logits: Tensor, rows: SampledRows) -> None:
    places = _Places()
    values: list[float] = []
    for row, item in _rows(rows, lambda params: bool(params.logit_bias)):
        bias = item.seq.params.logit_bias
        places.add(row, list(bias))
        values += bias.values()
    if places:
        _add(logits, *places.arrays(), np.array(values))


def _keep_allowed_tokens(logits: Tensor, rows: SampledRows) -> None:
    places = _Places()
    restricted: list[int] = []
    for row, item in _rows(rows, lambda params: params.allowed_token_ids is not None):
        places.add(row, item.seq.params.allowed_token_ids or [])
        restricted.append(row)
    if restricted:
        allowed = _indices(*places.arrays(), logits)
        values = logits[allowed]
        logits[torch.tensor(restricted, device=logits.device)] = -torch.inf
        logits[allowed] = values


def _ban_tokens(logits: Tensor, rows: SampledRows) -> None:
    places = _Places()
    for row, item in _rows(rows, lambda params: params.min_tokens > 0):
        if item.seq.num_output_tokens + rows.depths[row] < item.seq.params.min_tokens:
            places.add(row, item.seq.params.stop_token_ids)
    for first_row, item in _items(rows, lambda params: bool(params.bad_words)):
        for offset, path in enumerate(draft_paths(item)):
            places.add(first_row + offset, _bad_word_ends(item, path))
    if places:
        banned_rows, banned = places.arrays()
        exists = banned < logits.shape[1]  # a tokenizer may know stop tokens that the model does not
        logits[_indices(banned_rows[exists], banned[exists], logits)] = -torch.inf


def _bad_word_ends(item: Scheduled, path: list[int]) -> list[int]:
    """The tokens that would complete a bad word after `path`."""
    bad_words = item.seq.params.bad_words
    longest = max(len(word) for word in bad_words)
    before = item.seq.token_ids[-longest:] + path
    # A start before the text's first token makes a slice that is too short to match.
    return [word[-1] for word in bad_words if before[len(before) - len(word) + 1 :] == word[:-1]]


class _Places:
    """Where to change the logits: (row, token) pairs, collected request by request."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._tokens: list[IntArray] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, tokens: list[int] | IntArray) -> None:
        self._rows.append(row)
        self._tokens.append(np.asarray(tokens, dtype=np.int64))

    def add_history(self, first_row: int, item: Scheduled, verified: IntArray) -> None:
        """Adds for each of an item's rows the verified tokens and the drafts on its path."""
        for offset, path in enumerate(draft_paths(item)):
            self.add(first_row + offset, verified)
            self.add(first_row + offset, path)

    def arrays(self) -> tuple[IntArray, IntArray]:
        """The rows and the tokens. [num_entries] each"""
        lengths = [len(tokens) for tokens in self._tokens]
        return np.repeat(np.array(self._rows, dtype=np.int64), lengths), np.concatenate(self._tokens)

    def count(self) -> tuple[IntArray, IntArray, IntArray]:
        """The rows and tokens without repetition, and how often each occurs."""
        row, token = self.arrays()
        pairs, count = np.unique((row << 32) | token, return_counts=True)
        return pairs >> 32, pairs & 0xFFFFFFFF, count


def _items(rows: SampledRows, is_wanted: Callable[[SamplingParams], bool]) -> Iterator[tuple[int, Scheduled]]:
    """The items whose parameters are wanted, each with its first row."""
    for first_row, item in zip(rows.starts.tolist(), rows.items, strict=False):
        if is_wanted(item.seq.params):
            yield first_row, item


def _rows(rows: SampledRows, is_wanted: Callable[[SamplingParams], bool]) -> Iterator[tuple[int, Scheduled]]:
    """Every row of those items."""
    for first_row, item in _items(rows, is_wanted):
        for row in range(first_row, first_row + item.num_sampled_rows):
            yield row, item


def _add(logits: Tensor, row: IntArray, token: IntArray, values: FloatArray) -> None:
    """Adds values at distinct places."""
    places = _indices(row, token, logits)
    logits[places] = logits[places] + _on_device(values, logits)


def _indices(row: IntArray, token: IntArray, logits: Tensor) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(row).to(logits.device), torch.from_numpy(token).to(logits.device)


def _on_device(values: FloatArray, logits: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(logits.device)
