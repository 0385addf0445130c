"""Transcripts as what a draft model learns from: whole texts, and what the target says at each place of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.training.heads_data import HELD_OUT_EVERY, label_rows_of
from engine.training.transcripts import Transcripts

_PADDING = 0  # a token that nobody learns from


@dataclass(frozen=True, slots=True)
class TextBatch:
    """n texts of the longest one's length. N places in them, of which the target's word is known.

    token_ids: [n, length]. texts, columns: [N] where the places are. targets: [N] the token that came there
    label_rows, label_probs: [N, labels] rows of the target's likeliest tokens, and their probabilities
    """

    token_ids: Tensor
    texts: Tensor
    columns: Tensor
    targets: Tensor
    label_rows: Tensor
    label_probs: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftData:
    """known: [vocab_size] token ids by row, the most frequent first: a *row* is a place among them

    prefixes: of each text, what the target read before it spoke. starts: [num_texts + 1] of its places
    tokens, label_rows, label_probs: of all places, one text after the other
    indices: [num_texts] of the job's sequences. learned, held_out: texts to learn from, and others to measure on
    """

    known: Tensor
    prefixes: list[Tensor]
    starts: Tensor
    tokens: Tensor
    label_rows: Tensor
    label_probs: Tensor
    indices: Tensor
    learned: Tensor
    held_out: Tensor

    def batch(self, texts: Tensor) -> TextBatch:
        rows: list[Tensor] = []
        columns: list[Tensor] = []
        places: list[Tensor] = []
        for text in texts.tolist():
            first, last = int(self.starts[text]), int(self.starts[text + 1])
            prefix = self.prefixes[text]
            rows.append(torch.cat((prefix, self.tokens[first:last])))
            columns.append(len(prefix) - 1 + torch.arange(last - first))  # a place is where its token is said from
            places.append(torch.arange(first, last))
        token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_PADDING)
        chosen = torch.cat(places)
        counts = torch.tensor([len(one) for one in places])
        return TextBatch(
            token_ids=token_ids,
            texts=torch.repeat_interleave(torch.arange(len(rows)), counts),
            columns=torch.cat(columns),
            targets=self.tokens[chosen],
            label_rows=self.label_rows[chosen].long(),
            label_probs=self.label_probs[chosen].float(),
        )


def make_draft_data(
    transcripts: Transcripts, sequences: list[list[int]], known: Tensor, output: Tensor, *, are_answers: bool
) -> DraftData:
    """sequences: the job's, by index. output: [vocab_size, hidden_size] the target's output matrix, by row

    are_answers: transcripts go on from their sequences; else they are what follows the first token of each
    """
    indices = transcripts.indices.tolist()
    prefixes = [sequences[index] if are_answers else sequences[index][:1] for index in indices]
    rows, probs = label_rows_of(transcripts.states, output)
    is_held_out = (transcripts.indices // 2) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return DraftData(
        known=known,
        prefixes=[torch.tensor(prefix, dtype=torch.int64) for prefix in prefixes],
        starts=torch.cat((torch.zeros(1, dtype=torch.int64), transcripts.lengths.cumsum(0))),
        tokens=transcripts.tokens.long(),
        label_rows=rows,
        label_probs=probs,
        indices=transcripts.indices,
        learned=torch.nonzero(~is_held_out)[:, 0],
        held_out=torch.nonzero(is_held_out)[:, 0],
    )
