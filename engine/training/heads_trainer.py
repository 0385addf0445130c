"""What heads learn: to say what the target says next, its own distribution as labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from engine.training.heads_data import Batch, HeadsData
from engine.training.trainable_heads import TrainableHeads
from engine.training.trainer import Pace, Trainer

_HEAD_WEIGHT = 0.8  # of each head's loss against that of the head before it (the paper, section 2.2.1)
_NUM_FREQUENT, _NUM_DRAWN = 1024, 512  # rows that a step looks at beside those of its labels
_NUM_LABELS = 8  # of each position, that a step learns from


class HeadsTrainer(Trainer):
    """Its items are positions."""

    def __init__(self, heads: TrainableHeads, data: HeadsData, **pace: Unpack[Pace]) -> None:
        super().__init__(heads, data.learned, **pace)
        self._heads, self._data = heads, data

    def loss(self, items: Tensor, generator: torch.Generator) -> Tensor:
        batch = self._data.batch(items, self._heads.num_heads)
        chosen = choose_rows(batch.label_rows[..., :_NUM_LABELS], len(self._data.known), generator)
        return heads_loss(self._heads(batch.states, batch.previous_rows, chosen.rows), batch, chosen)


@dataclass(frozen=True, slots=True)
class ChosenRows:
    """The rows of the vocabulary that a step looks at: products with all of them would take four times as long.

    rows: [n]. weights: [n] log of how many rows each stands for. labels: the step's labels as places in `rows`
    """

    rows: Tensor
    weights: Tensor
    labels: Tensor


def choose_rows(labels: Tensor, num_known: int, generator: torch.Generator) -> ChosenRows:
    """Those of the labels and of frequent tokens, and a sample that stands for all others (sampled softmax, Jean et al.
    2015, arXiv 1412.2007). Rows are sorted by how frequent their tokens are."""
    is_certain = torch.zeros(num_known, dtype=torch.bool)
    is_certain[:_NUM_FREQUENT] = True
    is_certain[labels.flatten()] = True
    others = torch.nonzero(~is_certain)[:, 0]
    drawn = others[torch.randperm(len(others), generator=generator)[:_NUM_DRAWN]]
    certain = torch.nonzero(is_certain)[:, 0]
    rows = torch.cat((certain, drawn))
    weights = torch.zeros(len(rows))
    weights[len(certain) :] = math.log(len(others) / max(1, len(drawn))) if len(others) else 0.0
    place_of = torch.zeros(num_known, dtype=torch.int64)
    place_of[rows] = torch.arange(len(rows))
    return ChosenRows(rows, weights, place_of[labels])


def heads_loss(logits: list[Tensor], batch: Batch, chosen: ChosenRows) -> Tensor:
    """Cross entropy of each head with the target's distribution of the token that it guesses, later heads less.

    logits: of each head, [B, rows] of the chosen rows
    """
    probs = batch.label_probs[..., : chosen.labels.shape[-1]]
    probs = probs / probs.sum(-1, keepdim=True)
    total = logits[0].new_zeros(())
    for head, scores in enumerate(logits):
        log_probs = scores.gather(1, chosen.labels[:, head]) - (scores + chosen.weights).logsumexp(1, keepdim=True)
        entropy = -(log_probs * probs[:, head]).sum(1)
        is_there = batch.is_there[:, head]
        total = total + _HEAD_WEIGHT**head * (entropy * is_there).sum() / is_there.sum().clamp_min(1)
    return total
