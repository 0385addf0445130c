"""Which rows of a step's logits are sampled, and for whom."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.arrays import Ints
from engine.types import SamplingParams, Scheduled, Sequence


class SampledRow(NamedTuple):
    """A sampled row of a batch. Each item has the root first, then one row per draft."""

    item: Scheduled
    logits_row: int  # its place in the step's logits
    path: list[int]  # the draft tokens between the verified tokens and this row, from the root down
    position: int  # the index in its sequence that the row's token will have

    @property
    def params(self) -> SamplingParams:
        return self.item.seq.params

    @property
    def num_output_tokens(self) -> int:
        return self.position - self.item.seq.num_prompt_tokens


def is_penalised(params: SamplingParams) -> bool:
    """Whether tokens count that the text already has."""
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def next_position(item: Scheduled) -> int:
    """How many tokens the sequence has when this step's new ones are in: where the next one goes.

    Known to the scheduler before the tokens themselves are.
    """
    return item.seq.num_computed_tokens + item.num_new_tokens - item.num_drafts


def sampled_places(batch: list[Scheduled], positions: Ints | None = None) -> tuple[list[Sequence], Ints]:
    """The sequence and the position of each of `sampled_rows`, [num_rows], for those who need no more.

    positions: as `sampled_rows` has it
    """
    if positions is not None:
        return [item.seq for item in batch], positions
    seqs: list[Sequence] = []
    places: list[int] = []
    for item in batch:
        if not item.samples:
            continue
        seq, num_drafts = item.seq, item.num_drafts
        position = next_position(item)
        seqs.append(seq)
        places.append(position)
        if num_drafts:
            seqs += [seq] * num_drafts
            depths: list[int] = []
            for parent in seq.draft_parents[:num_drafts]:
                depths.append(1 if parent < 0 else depths[parent] + 1)
            places += [position + depth for depth in depths]
    return seqs, np.array(places, dtype=np.int64)


def sampled_rows(batch: list[Scheduled], positions: Ints | None = None) -> list[SampledRow]:
    """The sampled rows, item after item: the last of each item's logits.

    positions: of the row of each item, where every item has one and the sequences do not show it yet
    """
    _, of_rows = sampled_places(batch, positions)
    places = iter(of_rows.tolist())
    rows: list[SampledRow] = []
    first = 0
    for item in batch:
        first += item.num_scored
        if item.samples:
            paths = [[], *_draft_paths(item)]
            rows += [SampledRow(item, first + i, path, next(places)) for i, path in enumerate(paths)]
            first += len(paths)
    return rows


def _draft_paths(item: Scheduled) -> list[list[int]]:
    """The draft tokens from the root down to each draft, itself included."""
    paths: list[list[int]] = []
    seq = item.seq
    for token, parent in zip(seq.draft_token_ids[: item.num_drafts], seq.draft_parents[: item.num_drafts], strict=True):
        paths.append([*([] if parent < 0 else paths[parent]), token])
    return paths
