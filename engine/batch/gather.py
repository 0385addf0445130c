"""Gathers what the model reads in a step from the sequences of a plan: one pass in Python, the rest vectorised."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from engine.arrays import Bools, Ints
from engine.batch.step_inputs import KNOWN, NO_INTS, SequenceInputs
from engine.batch.tree_inputs import tree_mask, tree_positions
from engine.types import Scheduled

_CHAIN = list(range(-1, 4096))  # the parents of drafts that follow each other


class GatheredStep(NamedTuple):
    """The rows of a step and what its result is told by, as fields of `StepInputs` of the same names."""

    input_ids: Ints
    positions: Ints
    slots: Ints
    query_starts: Ints
    seq_lens: Ints
    logits_rows: Ints
    tree_mask: Bools | None
    seqs: SequenceInputs
    sources: Ints | None
    has_scores: bool  # whether any row scores a prompt token, and whether a sequence wants log-probabilities
    wants_logprobs: bool


def gather_step(batch: list[Scheduled], block_size: int) -> GatheredStep:
    decoding = None
    if batch[-1].num_new_tokens == 1:  # prompts follow the rows that decode: else these would be looked at in vain
        decoding = _gather_decoding(batch, block_size)
    return gather_any(batch, block_size) if decoding is None else decoding


def _gather_decoding(batch: list[Scheduled], block_size: int) -> GatheredStep | None:
    """A step in which each sequence computes one token and samples the next; None if it is not one.

    By far the most frequent step, and the shortest. It makes as few arrays as it can: each costs microseconds in a step
    that has just streamed all weights through the caches.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[list[int]] = [[] for _ in batch[0].seq.block_tables]
    is_ahead = any_wants = False
    for item in batch:
        if item.num_new_tokens != 1 or not item.samples or item.num_scored:
            return None
        seq = item.seq
        position = seq.num_computed_tokens + item.num_ahead
        positions.append(position)
        if item.source == KNOWN:
            token_ids.append(seq.token_ids[position])
        else:
            token_ids.append(0)
            is_ahead = True
        any_wants = any_wants or seq.request.params.logprobs is not None
        column, offset = divmod(position, block_size)
        for of_group, table in zip(slots, seq.block_tables, strict=True):
            of_group.append(table[column] * block_size + offset)
    starts, rows, seqs = _single_rows(len(batch))
    if any_wants:
        wants = [item.seq.request.params.logprobs is not None for item in batch]
        seqs = replace(seqs, wants_logprobs=np.array(wants, dtype=np.bool_))
    places = np.array(positions, dtype=np.int64)
    return GatheredStep(
        input_ids=np.array(token_ids, dtype=np.int64),
        positions=places,
        slots=np.array(slots, dtype=np.int64),
        query_starts=starts,
        seq_lens=places + 1,
        logits_rows=rows,
        tree_mask=None,
        seqs=seqs,
        sources=_sources(batch, starts) if is_ahead else None,
        has_scores=False,
        wants_logprobs=any_wants,
    )


@lru_cache(maxsize=1024)
def _single_rows(num_seqs: int) -> tuple[Ints, Ints, SequenceInputs]:
    """Query starts, the rows with logits and the facts of sequences that sample a row each. Shared by many steps."""
    zeros, ones = np.zeros(num_seqs, dtype=np.int64), np.ones(num_seqs, dtype=np.int64)
    seqs = SequenceInputs(zeros, ones, np.zeros(num_seqs, dtype=np.bool_), NO_INTS)
    return np.arange(num_seqs + 1), np.arange(num_seqs), seqs


def gather_any(batch: list[Scheduled], block_size: int) -> GatheredStep:
    facts: list[tuple[int, int, int, int, int, bool]] = []  # in the order of the columns below
    token_ids: list[int] = []
    parents: list[int] = []
    blocks: list[int] = []  # of the new tokens in the first group, sequence after sequence
    is_tree = is_ahead = has_scores = any_wants = False
    for item in batch:
        seq, num_tokens, num_drafts = item.seq, item.num_new_tokens, item.num_drafts
        first, table = seq.num_computed_tokens + item.num_ahead, seq.block_tables[0]
        first_block, num_sampled = first // block_size, 1 + num_drafts if item.samples else 0
        wants_logprobs = seq.request.params.logprobs is not None
        any_wants, has_scores = any_wants or wants_logprobs, has_scores or item.num_scored > 0
        base = len(blocks) - first_block  # where the first block of the sequence would be among them
        facts.append((num_tokens, first, base, item.num_scored, num_sampled, wants_logprobs))
        if item.source != KNOWN:
            token_ids.append(0)
            is_ahead = True
        elif num_tokens == 1:
            token_ids.append(seq.token_ids[first])
        else:
            token_ids += seq.token_ids[first : first + num_tokens - num_drafts]
        if num_tokens == 1:
            blocks.append(table[first_block])
        else:
            blocks += table[first_block : (first + num_tokens - 1) // block_size + 1]
        if num_drafts:
            token_ids += seq.draft_token_ids[:num_drafts]
            chain = seq.draft_parents[:num_drafts]
            is_tree = is_tree or chain != _CHAIN[:num_drafts]
            parents += chain
    columns = np.array(facts, dtype=np.int64).T.copy()
    num_new, computed, bases, num_scored, num_sampled_rows, wants = columns
    starts = _starts(num_new)
    seq_lens = computed + num_new
    rows, seq_of_row = np.arange(len(token_ids)), np.repeat(np.arange(len(batch)), num_new)
    positions = rows + (seq_lens - starts[1:])[seq_of_row]  # where in the context, drafts in order
    block_columns, offsets = np.divmod(positions, block_size)
    of_groups = [blocks, *(_new_blocks(batch, group, block_size) for group in range(1, len(seq.block_tables)))]
    of_rows = np.array(of_groups, dtype=np.int64).take(bases[seq_of_row] + block_columns, axis=1)
    num_logits = num_scored + num_sampled_rows
    all_wanted = int(num_logits.sum()) == len(rows)
    return GatheredStep(
        input_ids=np.array(token_ids, dtype=np.int64),
        positions=tree_positions(batch, starts, positions) if is_tree else positions,
        slots=of_rows * block_size + offsets,
        query_starts=starts,
        seq_lens=seq_lens,
        logits_rows=rows if all_wanted else last_rows(starts[1:], num_logits),
        tree_mask=tree_mask(batch, starts) if is_tree else None,
        seqs=SequenceInputs(num_scored, num_sampled_rows, wants.astype(np.bool_), np.array(parents, dtype=np.int64)),
        sources=_sources(batch, starts) if is_ahead else None,
        has_scores=has_scores,
        wants_logprobs=any_wants,
    )


def _new_blocks(batch: list[Scheduled], group: int, block_size: int) -> list[int]:
    """The blocks of the new tokens in one group of layers, sequence after sequence."""
    blocks: list[int] = []
    for item in batch:
        first = item.seq.num_computed_tokens + item.num_ahead
        last = first + item.num_new_tokens - 1
        blocks += item.seq.block_tables[group][first // block_size : last // block_size + 1]
    return blocks


def last_rows(ends: Ints, numbers: Ints) -> Ints:
    """Of spans of rows that end at `ends`, the last `numbers[i]` of each, one span after the other."""
    upto = numbers.cumsum()
    rows: Ints = np.arange(upto[-1]) + np.repeat(ends - upto, numbers)
    return rows


def _starts(sizes: Ints) -> Ints:
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    sizes.cumsum(out=starts[1:])
    return starts


def _sources(batch: list[Scheduled], starts: Ints) -> Ints:
    sources = np.full(starts[-1], KNOWN, dtype=np.int64)
    sources[starts[:-1]] = [item.source for item in batch]
    return sources
