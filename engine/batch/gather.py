"""Gathers what the model reads in a step from the sequences of a plan: one pass in Python, the rest vectorised."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np

from engine.arrays import Bools, Ints
from engine.batch.step_inputs import KNOWN, SequenceInputs
from engine.batch.tree_inputs import tree_mask, tree_positions
from engine.types import Scheduled

_CHAIN = list(range(-1, 4096))  # the parents of drafts that follow each other


class TokenRows(NamedTuple):
    """The rows of a step, as fields of `StepInputs` of the same names."""

    input_ids: Ints
    positions: Ints
    slots: Ints
    query_starts: Ints
    seq_lens: Ints
    logits_rows: Ints
    tree_mask: Bools | None
    sources: Ints | None


def gather_rows(batch: list[Scheduled], block_size: int) -> TokenRows:
    num_new: list[int] = []
    num_logits: list[int] = []
    computed: list[int] = []
    token_ids: list[int] = []
    blocks: list[int] = []  # of the new tokens, sequence after sequence
    bases: list[int] = []  # where the first block of each sequence would be among them
    is_tree = is_ahead = False
    for item in batch:
        seq, num_tokens, num_drafts, first = item.seq, item.num_new_tokens, item.num_drafts, item.num_computed_tokens
        first_block = first // block_size
        bases.append(len(blocks) - first_block)
        if item.source != KNOWN:
            token_ids.append(0)
            is_ahead = True
        elif num_tokens == 1:
            token_ids.append(seq.token_ids[first])
        else:
            token_ids += seq.token_ids[first : first + num_tokens - num_drafts]
        if num_tokens == 1:
            blocks.append(seq.block_table[first_block])
        else:
            blocks += seq.block_table[first_block : (first + num_tokens - 1) // block_size + 1]
        if num_drafts:
            token_ids += seq.draft_token_ids[:num_drafts]
            is_tree = is_tree or seq.draft_parents[:num_drafts] != _CHAIN[:num_drafts]
        num_new.append(num_tokens)
        computed.append(first)
        num_logits.append(item.num_scored + (1 + num_drafts if item.samples else 0))
    starts = np.array(list(accumulate(num_new, initial=0)), dtype=np.int64)
    seq_lens = np.array(computed, dtype=np.int64) + num_new
    rows = np.arange(len(token_ids))
    if len(rows) == len(batch):  # a row each
        seq_of_row, positions = rows, seq_lens - 1
    else:
        seq_of_row = np.repeat(np.arange(len(batch)), num_new)
        positions = rows + (seq_lens - starts[1:])[seq_of_row]  # where in the context, drafts in order
    columns, offsets = np.divmod(positions, block_size)
    of_rows = np.array(blocks, dtype=np.int64)[np.array(bases, dtype=np.int64)[seq_of_row] + columns]
    ends = np.array(list(accumulate(num_logits)), dtype=np.int64)
    all_wanted = int(ends[-1]) == len(rows)
    return TokenRows(
        input_ids=np.array(token_ids, dtype=np.int64),
        positions=tree_positions(batch, starts, positions) if is_tree else positions,
        slots=of_rows * block_size + offsets,
        query_starts=starts,
        seq_lens=seq_lens,
        logits_rows=rows if all_wanted else np.arange(ends[-1]) + np.repeat(starts[1:] - ends, num_logits),
        tree_mask=tree_mask(batch, starts) if is_tree else None,
        sources=_sources(batch, starts) if is_ahead else None,
    )


def gather_seqs(batch: list[Scheduled]) -> SequenceInputs:
    tokens: list[int] = []
    parents: list[int] = []
    for item in batch:
        if item.num_drafts:
            tokens += item.seq.draft_token_ids[: item.num_drafts]
            parents += item.seq.draft_parents[: item.num_drafts]
    numbers = [
        (item.num_scored, item.num_sampled_rows, item.num_drafts, item.seq.request.params.logprobs is not None)
        for item in batch
    ]
    num_scored, num_sampled, num_drafts, wants_logprobs = np.array(numbers, dtype=np.int64).T
    return SequenceInputs(
        num_scored,
        num_sampled,
        num_drafts,
        wants_logprobs.astype(np.bool_),
        np.array(tokens, dtype=np.int64),
        np.array(parents, dtype=np.int64),
    )


def _sources(batch: list[Scheduled], starts: Ints) -> Ints:
    sources = np.full(starts[-1], KNOWN, dtype=np.int64)
    sources[starts[:-1]] = [item.source for item in batch]
    return sources
