"""Trains a module: Adam, a cosine, and a state in a file, from which an interrupted training goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn
from tqdm import tqdm

_SAVE_INTERVAL = 60.0  # seconds
_NUM_WARMUP_STEPS = 50


class Pace(TypedDict):
    """How long and how fast is learned: items of a step, times that each is seen, Adam's largest rate, and chance."""

    batch_size: int
    num_epochs: int
    learning_rate: float
    seed: int


class Trainer:
    """Every step is a function of the seed and its number, so that an interrupted run ends as any other."""

    def __init__(self, module: nn.Module, items: Tensor, **pace: Unpack[Pace]) -> None:
        """items: [n] what is learned from in each epoch, in batches: whatever `loss` knows by these numbers"""
        self._module, self._items = module, items
        self._batch_size = min(pace["batch_size"], len(items))
        self._learning_rate, self._seed = pace["learning_rate"], pace["seed"]
        self._steps_per_epoch = max(1, len(items) // max(1, self._batch_size))
        self.num_steps = pace["num_epochs"] * self._steps_per_epoch
        self._learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.Adam(self._learned, lr=pace["learning_rate"])
        self._step = 0
        self.mean_loss = math.nan  # smoothed

    def loss(self, items: Tensor, generator: torch.Generator) -> Tensor:
        """Of a batch. generator: for what is drawn by chance"""
        raise NotImplementedError

    def train(self, state: Path) -> None:
        """Trains to the end, and keeps its state in a file once a minute and when it is over."""
        self._restore(state)
        saved_at = time.monotonic()
        with tqdm(total=self.num_steps, initial=self._step, desc="training", unit="step", disable=None) as bar:
            for items in self._batches():
                loss = self._learn(items)
                self.mean_loss = loss if math.isnan(self.mean_loss) else 0.98 * self.mean_loss + 0.02 * loss
                bar.update()
                bar.set_postfix(loss=f"{self.mean_loss:.3f}", refresh=False)
                if time.monotonic() > saved_at + _SAVE_INTERVAL:
                    self._save(state)
                    saved_at = time.monotonic()
        self._save(state)

    def _batches(self) -> Iterator[Tensor]:
        while self._step < self.num_steps:
            epoch = self._step // self._steps_per_epoch
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = self._items[torch.randperm(len(self._items), generator=generator)]
            for index in range(self._step % self._steps_per_epoch, self._steps_per_epoch):
                yield order[index * self._batch_size : (index + 1) * self._batch_size]

    def _learn(self, items: Tensor) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * self._schedule()
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.loss(items, torch.Generator().manual_seed(self._seed * 1_000_003 - 1 - self._step))
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
                "module": {name: p.detach() for name, p in self._module.named_parameters() if p.requires_grad},
                "optimizer": self._optimizer.state_dict(),
                "step": self._step,
                "num_steps": self.num_steps,
                "loss": self.mean_loss,
            },
            partial,
        )
        partial.replace(state)

    def _restore(self, state: Path) -> None:
        """ValueError for a file of another run: other data, or another module."""
        if not state.is_file():
            return
        try:
            kept = torch.load(state, weights_only=True)
            if kept["num_steps"] != self.num_steps:
                raise ValueError(f"it is of a training of {kept['num_steps']} steps, and this one has {self.num_steps}")
            missing, unknown = self._module.load_state_dict(kept["module"], strict=False)
            learned = {name for name, parameter in self._module.named_parameters() if parameter.requires_grad}
            if unknown or learned & set(missing):
                raise ValueError("it has other parameters")
            self._optimizer.load_state_dict(kept["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{state} cannot be gone on with: {error}; delete it to train from the start") from error
        self._step, self.mean_loss = kept["step"], kept["loss"]
