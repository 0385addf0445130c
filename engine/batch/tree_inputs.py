"""What a tree of drafts changes in a step: a draft's position is its depth, and it sees its ancestors alone."""

from __future__ import annotations

import numpy as np

from engine.arrays import Bools, Ints
from engine.types import Scheduled


def tree_positions(batch: list[Scheduled], starts: Ints, cache_positions: Ints) -> Ints:
    """The depth in its text of every row. starts: [num_seqs + 1] rows; cache_positions: [num_tokens] drafts in order"""
    positions = cache_positions.copy()
    for item, end in zip(batch, starts[1:], strict=True):
        first = end - item.num_drafts
        depths: list[int] = []
        for parent in item.seq.draft_parents[: item.num_drafts]:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        if depths:
            positions[first:end] = positions[first - 1] + np.array(depths, dtype=np.int64)
    return positions


def tree_mask(batch: list[Scheduled], starts: Ints) -> Bools:
    """Whether a row sees its sequence's j-th row of this step. [num_tokens, longest query]"""
    width = int(np.diff(starts).max())
    mask = np.zeros((starts[-1], width), dtype=bool)
    for item, start in zip(batch, starts, strict=False):
        num_verified = item.num_new_tokens - item.num_drafts
        rows = mask[start : start + item.num_new_tokens]
        rows[:num_verified, :num_verified] = np.tri(num_verified, dtype=bool)
        for i, parent in enumerate(item.seq.draft_parents[: item.num_drafts]):
            row = num_verified + i
            rows[row] = rows[num_verified - 1 if parent < 0 else num_verified + parent]
            rows[row, row] = True
    return mask
