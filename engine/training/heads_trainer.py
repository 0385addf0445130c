"""Trains heads: Adam, a cosine, and the target's own distribution as labels. Goes on where it was interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.training.heads_data import Batch, HeadsData
from engine.training.trainable_heads import TrainableHeads

_HEAD_WEIGHT = 0.8  # of each head's loss against that of the head before it (the paper, section 2.2.1)
_SAVE_INTERVAL = 60.0  # seconds
_NUM_WARMUP_STEPS = 50
_NUM_FREQUENT, _NUM_DRAWN = 1024, 512  # rows that a step looks at beside those of its labels
_NUM_LABELS = 8  # of each position, that a step learns from


class HeadsTrainer:
    """Every step is a function of the seed and its number, so that an interrupted run ends as any other."""

    def __init__(
        self,
        heads: TrainableHeads,
        data: HeadsData,
        *,
        batch_size: int,
        num_epochs: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        self._heads, self._data = heads, data
        self._batch_size = min(batch_size, len(data.learned))
        self._learning_rate, self._seed = learning_rate, seed
        self._steps_per_epoch = max(1, len(data.learned) // max(1, self._batch_size))
        self.num_steps = num_epochs * self._steps_per_epoch
        self._optimizer = torch.optim.Adam(heads.parameters(), lr=learning_rate)
        self._step = 0
        self.loss = math.nan  # smoothed

    def train(self, state: Path) -> None:
        """Trains to the end, and keeps its state in a file once a minute and when it is over."""
        self._restore(state)
        saved_at = time.monotonic()
        with tqdm(total=self.num_steps, initial=self._step, desc="training", unit="step", disable=None) as bar:
            for positions in self._batches():
                loss = self._learn(self._data.batch(positions, self._heads.num_heads))
                self.loss = loss if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss
                bar.update()
                bar.set_postfix(loss=f"{self.loss:.3f}", refresh=False)
                if time.monotonic() > saved_at + _SAVE_INTERVAL:
                    self._save(state)
                    saved_at = time.monotonic()
        self._save(state)

    def _batches(self) -> Iterator[Tensor]:
        while self._step < self.num_steps:
            epoch = self._step // self._steps_per_epoch
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = self._data.learned[torch.randperm(len(self._data.learned), generator=generator)]
            for index in range(self._step % self._steps_per_epoch, self._steps_per_epoch):
                yield order[index * self._batch_size : (index + 1) * self._batch_size]

    def _learn(self, batch: Batch) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * self._schedule()
        self._optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 - 1 - self._step)
        chosen = choose_rows(batch.label_rows[..., :_NUM_LABELS], len(self._data.known), generator)
        loss = heads_loss(self._heads(batch.states, batch.previous_rows, chosen.rows), batch, chosen)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._step += 1
        return float(loss.detach())

    def _schedule(self) -> float:
        warmup = min(1.0, (self._step + 1) / _NUM_WARMUP_STEPS)
        return warmup * 0.5 * (1 + math.cos(math.pi * self._step / self.num_steps))

    def _save(self, state: Path) -> None:
        state.parent.mkdir(parents=True, exist_ok=True)
        partial = state.with_name(f".{state.name}")
        torch.save(
            {
                "heads": self._heads.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "step": self._step,
                "num_steps": self.num_steps,
                "loss": self.loss,
            },
            partial,
        )
        partial.replace(state)

    def _restore(self, state: Path) -> None:
        """ValueError for a file of another run: other data, or other heads."""
        if not state.is_file():
            return
        try:
            kept = torch.load(state, weights_only=True)
            if kept["num_steps"] != self.num_steps:
                raise ValueError(f"it is of a training of {kept['num_steps']} steps, and this one has {self.num_steps}")
            self._heads.load_state_dict(kept["heads"])
            self._optimizer.load_state_dict(kept["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{state} cannot be gone on with: {error}; delete it to train from the start") from error
        self._step, self.loss = kept["step"], kept["loss"]


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
