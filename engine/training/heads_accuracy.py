"""How often heads are right on sequences that they have not learned from: by rank, and in a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.speculation.medusa_heads import MedusaHeads
from engine.training.heads_data import HeadsData

NUM_RANKS = 10
_SHOWN = (1, 2, 4, 8)
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class HeadsAccuracy:
    """by_rank: [num_heads][NUM_RANKS] how often the candidate of that rank was right, where those before it were.

    num_positions: measured on. accepted: tokens of a chain of first candidates that were right, on average
    """

    by_rank: list[list[float]]
    num_positions: int
    accepted: float

    def table(self) -> str:
        lines = ["head   " + "  ".join(f"top-{count}" for count in _SHOWN)]
        for head, ranks in enumerate(self.by_rank):
            shares = "  ".join(f"{sum(ranks[:count]):5.3f}" for count in _SHOWN)
            lines.append(f"{head + 1:<6} {shares}")
        lines.append(f"a chain of {len(self.by_rank)} drafts gives {1 + self.accepted:.2f} tokens a step")
        return "\n".join([*lines, f"({self.num_positions:,} positions of answers that were held out)"])


@torch.inference_mode()
def measure_accuracy(heads: MedusaHeads, data: HeadsData) -> HeadsAccuracy:
    """Measures heads as they will be used, read from their files. Tokens that they do not know count as wrong."""
    num_ranks = min(NUM_RANKS, len(data.known))
    hits = torch.zeros(heads.num_heads, num_ranks)
    counts = torch.zeros(heads.num_heads)
    accepted = 0.0
    for start in range(0, len(data.held_out), _ROWS_AT_ONCE):
        batch = data.batch(data.held_out[start : start + _ROWS_AT_ONCE], heads.num_heads)
        logits = heads.logits(batch.states, batch.previous[:, 0])
        is_right = torch.ones(len(batch.states), dtype=torch.bool)
        for head in range(heads.num_heads):
            ids, _ = heads.children(logits[:, head], batch.previous[:, head], num_ranks)
            matches = (ids == batch.targets[:, head, None]) & batch.is_there[:, head, None]
            hits[head] += matches.sum(0)
            counts[head] += batch.is_there[:, head].sum()
            is_right &= matches[:, 0]
            accepted += float(is_right.sum())
    shares = hits / counts.clamp_min(1)[:, None]
    by_rank = [[round(share, 4) for share in row] for row in shares.tolist()]
    return HeadsAccuracy(by_rank, len(data.held_out), accepted / max(1, len(data.held_out)))
