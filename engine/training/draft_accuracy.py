"""How often a draft model is right on texts that it has not learned from, with the target's noise, as it will draft."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.sampling.metadata import GREEDY_BELOW
from engine.sampling.noise import gumbel, noise_bits, noise_keys, token_words
from engine.training.collector import sampling_of
from engine.training.draft_data import DraftData
from engine.training.pruned_model import PrunedModel

NUM_DRAFTS = 5
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class DraftAccuracy:
    """accepted: [NUM_DRAFTS] how often a chain's drafts up to each were right. num_positions: measured on"""

    accepted: list[float]
    num_positions: int

    def table(self) -> str:
        shares = "  ".join(f"{share:5.3f}" for share in self.accepted)
        return "\n".join(
            [
                "draft      " + "  ".join(f"{number:>5}" for number in range(1, NUM_DRAFTS + 1)),
                f"accepted   {shares}",
                f"a chain of {NUM_DRAFTS} drafts gives {1 + sum(self.accepted):.2f} tokens a step",
                f"({self.num_positions:,} positions of answers that were held out)",
            ]
        )


@torch.inference_mode()
def measure_draft(model: PrunedModel, data: DraftData, *, are_answers: bool) -> DraftAccuracy:
    """A draft is right where it is the token that the target has said, as long as those before it are."""
    rights = [_is_right(model, data, text, are_answers=are_answers) for text in data.held_out.tolist()]
    num_positions = sum(len(right) for right in rights)
    accepted = []
    for length in range(1, NUM_DRAFTS + 1):
        runs = sum(int(right.unfold(0, length, 1).all(1).sum()) for right in rights if len(right) >= length)
        accepted.append(round(runs / max(1, num_positions), 4))
    return DraftAccuracy(accepted, num_positions)


def _is_right(model: PrunedModel, data: DraftData, text: int, *, are_answers: bool) -> Tensor:
    """[places] Texts that were only read are no samples: there, the target's likeliest token is what it says."""
    batch = data.batch(torch.tensor([text]))
    states = model(batch.token_ids)[0, batch.columns]
    params = sampling_of(int(data.indices[text]), 1)
    is_greedy = params.temperature < GREEDY_BELOW or not are_answers
    targets = batch.targets if are_answers else data.known[batch.label_rows[:, 0]]
    positions = (batch.columns + 1).numpy()
    right = []
    for start in range(0, len(states), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        scores = F.linear(states[part], model.output)
        if not is_greedy:
            scores = scores / params.temperature + _noise(params.seed, positions[part], scores.shape[1])
        right.append(scores.argmax(1) == targets[part])
    return torch.cat(right)


def _noise(seed: int, positions: np.typing.NDArray[np.int64], vocab_size: int) -> Tensor:
    """[len(positions), vocab_size] float32"""
    keys = noise_keys(np.full(len(positions), seed, dtype=np.uint64), positions)
    words = token_words(vocab_size)
    return torch.from_numpy(np.stack([gumbel(noise_bits(words, key)) for key in keys]))
