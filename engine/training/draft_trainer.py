"""What a draft model learns: at every place of a text, the target's own distribution."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.training.draft_data import DraftData
from engine.training.heads_trainer import choose_rows
from engine.training.pruned_model import PrunedModel
from engine.training.trainer import Pace, Trainer


class DraftTrainer(Trainer):
    """Its items are texts."""

    def __init__(self, model: PrunedModel, data: DraftData, **pace: Unpack[Pace]) -> None:
        super().__init__(model, data.learned, **pace)
        self._model, self._data = model, data

    def loss(self, items: Tensor, generator: torch.Generator) -> Tensor:
        """Cross entropy with the target's distribution, over the labels and a sample of all other tokens."""
        batch = self._data.batch(items)
        chosen = choose_rows(batch.label_rows, len(self._data.known), generator)
        states = self._model(batch.token_ids)[batch.texts, batch.columns]
        logits = F.linear(states, self._model.output[self._data.known[chosen.rows]])
        log_probs = logits.gather(1, chosen.labels) - (logits + chosen.weights).logsumexp(1, keepdim=True)
        probs = batch.label_probs / batch.label_probs.sum(-1, keepdim=True)
        return -(log_probs * probs).sum(1).mean()
