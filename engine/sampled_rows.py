"""Which rows of a step's logits are sampled, and for whom."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from engine.types import SamplingParams, Scheduled

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_WORD64 = (1 << 64) - 1


@dataclass(frozen=True)
class SampledRows:
    """The sampled rows of a batch, item after item: of each item the root, then one row per draft.

    A row's *depth* is how many drafts lie between it and the verified tokens: 0 at the root, j for the j-th of a chain.
    """

    items: list[Scheduled]  # those that sample
    starts: IntArray  # [num_items + 1] first row of each item
    item_of_row: IntArray  # [num_rows]
    logits_rows: IntArray  # [num_rows] the row's place in the step's logits
    depths: IntArray  # [num_rows]

    @cached_property
    def positions(self) -> IntArray:
        """The index in its sequence that each row's token will have. [num_rows]"""
        return np.array([item.seq.num_tokens for item in self.items], dtype=np.int64)[self.item_of_row] + self.depths

    @cached_property
    def seeds(self) -> npt.NDArray[np.uint64]:
        """The seed of each row's request, modulo 2^64. [num_rows]"""
        return np.array([params.seed & _WORD64 for params in self.params], dtype=np.uint64)[self.item_of_row]

    def per_row(self, values: list[float]) -> FloatArray:
        """One value per item, repeated for its rows. [num_rows] float64"""
        return np.array(values, dtype=np.float64)[self.item_of_row]

    @property
    def params(self) -> list[SamplingParams]:
        return [item.seq.params for item in self.items]


def sampled_rows(batch: list[Scheduled]) -> SampledRows:
    items = [item for item in batch if item.samples]
    num_rows = np.array([item.num_sampled_rows for item in items], dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(num_rows)))
    item_of_row = np.repeat(np.arange(len(items)), num_rows)
    # An item's sampled rows are the last of its logits.
    ends = np.cumsum([item.num_logits for item in batch], dtype=np.int64)
    ends_of_items = ends[[item.samples for item in batch]]
    logits_rows = np.arange(starts[-1]) + (ends_of_items - starts[1:])[item_of_row]
    depths = [depth for item in items for depth in _depths(item)]
    return SampledRows(items, starts, item_of_row, logits_rows, np.array(depths, dtype=np.int64))


def draft_paths(item: Scheduled) -> list[list[int]]:
    """The draft tokens between the verified tokens and each sampled row, from the root down."""
    paths: list[list[int]] = [[]]
    seq = item.seq
    for token, parent in zip(seq.draft_token_ids[: item.num_drafts], seq.draft_parents[: item.num_drafts], strict=True):
        paths.append([*paths[parent + 1], token])
    return paths


def _depths(item: Scheduled) -> list[int]:
    depths = [0]
    for parent in item.seq.draft_parents[: item.num_drafts]:
        depths.append(depths[parent + 1] + 1)
    return depths
