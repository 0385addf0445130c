"""Transcripts as what heads learn from: states, the tokens behind each, and what else the target would have said.

A *row* is a place among the tokens that heads know; tokens that they do not know share one row, the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from engine.training.transcripts import Transcripts

HELD_OUT_EVERY = 20  # pairs of sequences, of which one is greedy: of so many, one pair is kept for the accuracies
_NUM_LABELS = 16  # the target's likeliest tokens, which have nearly all of the probability
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class Batch:
    """B positions. previous, targets: [B, num_heads] the token before the one that each head guesses, and that one.
    previous_rows: of `previous`. is_there: [B, num_heads] whether the sequence is as long
    label_rows, label_probs: [B, num_heads, labels]
    """

    states: Tensor  # [B, hidden_size] float32
    previous: Tensor
    targets: Tensor
    previous_rows: Tensor
    is_there: Tensor
    label_rows: Tensor
    label_probs: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsData:
    """N positions of all sequences, one after the other.

    known: [num_known] token ids, by row. row_of: [vocab_size] the other way round
    states: [N, hidden_size] float16. tokens: [N] int64, the one that was sampled from each state
    num_left: [N] tokens of the same sequence behind it
    label_rows, label_probs: [N, labels] the target's likeliest known tokens there, and their probabilities
    learned, held_out: positions to learn from, and those of other sequences to measure on
    """

    known: Tensor
    row_of: Tensor
    states: Tensor
    tokens: Tensor
    num_left: Tensor
    label_rows: Tensor
    label_probs: Tensor
    learned: Tensor
    held_out: Tensor

    def batch(self, positions: Tensor, num_heads: int) -> Batch:
        ahead = torch.arange(1, num_heads + 1)
        places = (positions[:, None] + ahead).clamp_max(len(self.tokens) - 1)
        previous = self.tokens[(positions[:, None] + ahead - 1).clamp_max(len(self.tokens) - 1)]
        return Batch(
            states=self.states[positions].float(),
            previous=previous,
            targets=self.tokens[places],
            previous_rows=self.row_of[previous],
            is_there=self.num_left[positions, None] >= ahead,
            label_rows=self.label_rows[places].long(),
            label_probs=self.label_probs[places].float(),
        )


def frequent_tokens(transcripts: Transcripts, *, count: int, vocab_size: int) -> Tensor:
    """The tokens that heads will know: the most frequent first, then those with the lowest ids. [count] int64"""
    counts = torch.bincount(transcripts.tokens.long(), minlength=vocab_size)
    return torch.argsort(counts, descending=True, stable=True)[: min(count, vocab_size)]


def make_data(transcripts: Transcripts, known: Tensor, output: Tensor, *, vocab_size: int) -> HeadsData:
    """known: token ids, by row. output: [num_known, hidden_size] the target's output matrix, of these tokens."""
    row_of = torch.full((vocab_size,), len(known))
    row_of[known] = torch.arange(len(known))
    ends = transcripts.lengths.cumsum(0)
    num_left = torch.repeat_interleave(ends, transcripts.lengths) - 1 - torch.arange(len(transcripts.tokens))
    is_held_out = (transcripts.indices // 2) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    is_held_out = torch.repeat_interleave(is_held_out, transcripts.lengths)
    label_rows, label_probs = label_rows_of(transcripts.states, output)
    return HeadsData(
        known=known,
        row_of=row_of,
        states=transcripts.states,
        tokens=transcripts.tokens.long(),
        num_left=num_left,
        label_rows=label_rows,
        label_probs=label_probs,
        learned=torch.nonzero((num_left > 0) & ~is_held_out)[:, 0],
        held_out=torch.nonzero((num_left > 0) & is_held_out)[:, 0],
    )


def label_rows_of(states: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest rows of each state's own distribution, and their probabilities, which sum to 1."""
    num_labels = min(_NUM_LABELS, len(output))
    rows = torch.empty(len(states), num_labels, dtype=torch.int32)
    probs = torch.empty(len(states), num_labels, dtype=torch.float16)
    for start in tqdm(range(0, len(states), _ROWS_AT_ONCE), desc="labels", unit_scale=_ROWS_AT_ONCE, disable=None):
        part = slice(start, start + _ROWS_AT_ONCE)
        best = (states[part].float() @ output.T).topk(num_labels)
        rows[part], probs[part] = best.indices, best.values.softmax(-1)
    return rows, probs
