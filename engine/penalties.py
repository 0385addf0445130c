"""Changes to the logits that a request asks for: penalties, bias and bans.

Applied in this order, each to what the one before left:

1. repetition penalty, over the tokens of prompt and output: a positive logit is divided by it, a negative one
   multiplied (Keskar et al. 2019, "CTRL", section 4.1, with the sign handled as all servers do);
2. frequency penalty times the number of occurrences, plus presence penalty, over the output, subtracted;
3. logit bias, added;
4. bans: every token but the allowed ones, the last token of a bad word whose other tokens have just been written
   (the end of the prompt counts), stop tokens before min_tokens.

For a row behind drafts, the drafts on its path count as output. All edits are sparse: lists of (row, token, value) are
made on the host and applied to the rows of all requests at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.sampled_rows import SampledRows, draft_paths
from engine.types import SamplingParams, Scheduled

Tokens = npt.NDArray[np.int64]


def edits_logits(params: SamplingParams) -> bool:
    """Whether a request may change any logit."""
    return bool(
        _penalizes_output(params)
        or params.repetition_penalty != 1.0
        or params.logit_bias
        or params.allowed_token_ids is not None
        or params.bad_words
        or (params.min_tokens and params.stop_token_ids)
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
    entries = _Entries(logits)
    for row, item, path in _rows_with_paths(rows, lambda params: params.repetition_penalty != 1.0):
        tokens = np.unique(np.array(item.seq.token_ids + path, dtype=np.int64))
        entries.add(row, tokens, item.seq.params.repetition_penalty)
    if entries:
        places, penalty = entries.places(), entries.values()
        found = logits[places]
        penalized = torch.where(found > 0, found / penalty, found * penalty)
        logits[places] = penalized.clamp_max_(torch.finfo(torch.float32).max)  # a penalty near 0 may overflow


def _apply_output_penalties(logits: Tensor, rows: SampledRows) -> None:
    entries = _Entries(logits)
    for row, item, path in _rows_with_paths(rows, _penalizes_output):
        params = item.seq.params
        output = np.array(item.seq.token_ids[item.seq.num_prompt_tokens :] + path, dtype=np.int64)
        tokens, counts = np.unique(output, return_counts=True)
        entries.add(row, tokens, counts * np.float64(params.frequency_penalty) + params.presence_penalty)
    if entries:
        places = entries.places()
        logits[places] = logits[places] - entries.values()


def _apply_logit_bias(logits: Tensor, rows: SampledRows) -> None:
    entries = _Entries(logits)
    for row, item in _rows(rows, lambda params: bool(params.logit_bias)):
        bias = item.seq.params.logit_bias
        entries.add(row, np.fromiter(bias, dtype=np.int64), np.fromiter(bias.values(), dtype=np.float64))
    if entries:
        places = entries.places()
        logits[places] = logits[places] + entries.values()


def _keep_allowed_tokens(logits: Tensor, rows: SampledRows) -> None:
    entries = _Entries(logits)
    restricted: list[int] = []
    for row, item in _rows(rows, lambda params: params.allowed_token_ids is not None):
        entries.add(row, np.array(item.seq.params.allowed_token_ids, dtype=np.int64), 0.0)
        restricted.append(row)
    if restricted:
        places = entries.places()
        allowed = logits[places]
        logits[torch.tensor(restricted, device=logits.device)] = -torch.inf
        logits[places] = allowed


def _ban_tokens(logits: Tensor, rows: SampledRows) -> None:
    entries = _Entries(logits)
    for row, item in _rows(rows, lambda params: bool(params.min_tokens and params.stop_token_ids)):
        if item.seq.num_output_tokens + rows.depths[row] < item.seq.params.min_tokens:
            entries.add(row, np.array(item.seq.params.stop_token_ids, dtype=np.int64), 0.0)
    for row, item, path in _rows_with_paths(rows, lambda params: bool(params.bad_words)):
        entries.add(row, np.array(_bad_word_ends(item, path), dtype=np.int64), 0.0)
    if entries:
        logits[entries.places()] = -torch.inf


def _bad_word_ends(item: Scheduled, path: list[int]) -> list[int]:
    """The tokens that would complete a bad word after `path`."""
    bad_words = item.seq.params.bad_words
    longest = max(len(word) for word in bad_words)
    before = item.seq.token_ids[-longest:] + path
    return [word[-1] for word in bad_words if before[len(before) - len(word) + 1 :] == word[:-1]]


class _Entries:
    """A list of (row, token, value), collected request by request and turned into tensors once."""

    def __init__(self, logits: Tensor) -> None:
        self._vocab_size = logits.shape[1]
        self._device = logits.device
        self._rows: list[Tokens] = []
        self._tokens: list[Tokens] = []
        self._values: list[npt.NDArray[np.float64]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, tokens: Tokens, values: npt.NDArray[np.float64] | float) -> None:
        is_in_vocabulary = tokens < self._vocab_size  # a tokenizer may know stop tokens that the model does not
        self._rows.append(np.full(int(is_in_vocabulary.sum()), row, dtype=np.int64))
        self._tokens.append(tokens[is_in_vocabulary])
        self._values.append(np.broadcast_to(np.float64(values), tokens.shape)[is_in_vocabulary])

    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and tokens, to index the logits with."""
        rows, tokens = np.concatenate(self._rows), np.concatenate(self._tokens)
        return torch.from_numpy(rows).to(self._device), torch.from_numpy(tokens).to(self._device)

    def values(self) -> Tensor:
        return torch.from_numpy(np.concatenate(self._values).astype(np.float32)).to(self._device)


def _rows(rows: SampledRows, is_wanted: Callable[[SamplingParams], bool]) -> Iterator[tuple[int, Scheduled]]:
    """The rows of the items whose parameters are wanted."""
    for index, item in enumerate(rows.items):
        if is_wanted(item.seq.params):
            for row in range(int(rows.starts[index]), int(rows.starts[index + 1])):
                yield row, item


def _rows_with_paths(
    rows: SampledRows, is_wanted: Callable[[SamplingParams], bool]
) -> Iterator[tuple[int, Scheduled, list[int]]]:
    """The same, with the drafts between the verified tokens and each row."""
    for index, item in enumerate(rows.items):
        if is_wanted(item.seq.params):
            for offset, path in enumerate(draft_paths(item)):
                yield int(rows.starts[index]) + offset, item, path
