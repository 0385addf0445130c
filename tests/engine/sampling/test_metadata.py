"""What rows need stays on the device: the noise keys of every step all the same, wherever its sequences have got to."""

import random

import numpy as np
import pytest
import torch

from engine.batch.step_inputs import RowFacts, SamplingInputs
from engine.runner.step_builder import StepBuilder
from engine.sampling.device_columns import Columns
from engine.sampling.noise import noise_keys
from engine.types import Request, SamplingParams, Scheduled, Sequence

CPU = torch.device("cpu")


def _sequences(count: int, **params: object) -> list[Sequence]:
    made = []
    for number in range(count):
        settings = SamplingParams(**{"seed": 7 * number - 3, "max_tokens": 9, "temperature": 0.5 + number, **params})
        made.append(Sequence(Request(request_id=str(number), prompt_token_ids=[1, 2], params=settings), [1, 2]))
    return made


def _inputs(
    seqs: list[Sequence], num_drafts: list[int] | None = None, builder: StepBuilder | None = None
) -> SamplingInputs:
    """Of a step in which each sequence decodes a token, behind so many drafts."""
    items = []
    for seq, num in zip(seqs, num_drafts or [0] * len(seqs), strict=True):
        seq.draft_token_ids, seq.draft_parents = [0] * num, list(range(-1, num - 1))
        seq.block_tables = [[1] * 100]
        items.append(Scheduled(seq, 1 + num, num, samples=True))
    return (builder or StepBuilder(16, 50)).build(items).sampling


def _facts(seqs: list[Sequence], num_drafts: list[int] | None = None) -> RowFacts:
    return _inputs(seqs, num_drafts).facts


def _check_keys(columns: Columns, rows: list[Sequence], positions: np.ndarray) -> None:
    seeds = np.array([seq.params.seed % 2**64 for seq in rows], dtype=np.uint64)
    keys = columns.at(positions)[1]
    assert keys.numpy().view(np.uint32).tolist() == noise_keys(seeds, positions).tolist()


@pytest.mark.parametrize("count", [1, 5])
def test_keys_follow_sequences_that_decode_in_step(count: int) -> None:
    seqs = _sequences(count)
    positions = np.arange(count) * 3 + 2
    columns = Columns(_facts(seqs), positions, CPU, vocab_size=50, before=None)
    for _ in range(1200):
        _check_keys(columns, seqs, positions)
        positions = positions + 1


def test_keys_follow_sequences_whose_drafts_are_right_or_wrong() -> None:
    rng, seqs, builder = random.Random(0), _sequences(3), StepBuilder(16, 50)
    newest = [5, 40, 2]
    columns = None
    for _ in range(150):
        num_drafts = [rng.choice([0, 2, 3]) for _ in seqs]
        rows = [seq for seq, num in zip(seqs, num_drafts, strict=True) for _ in range(1 + num)]
        positions = np.array(
            [first + i for first, num in zip(newest, num_drafts, strict=True) for i in range(1 + num)]
        )  # fmt: skip
        facts = _inputs(seqs, num_drafts, builder).facts
        if columns is None or columns.facts is not facts:
            columns = Columns(facts, positions, CPU, vocab_size=50, before=columns)
        _check_keys(columns, rows, positions)
        newest = [first + 1 + rng.randint(0, num) for first, num in zip(newest, num_drafts, strict=True)]


def test_a_sequence_that_starts_anew_gets_the_keys_of_its_positions() -> None:
    seqs = _sequences(2)
    rows = [seqs[0], seqs[0], seqs[1]]
    columns = Columns(_facts(seqs, [1, 0]), np.array([500, 501, 9]), CPU, vocab_size=50, before=None)
    _check_keys(columns, rows, np.array([30, 31, 9]))


def test_settings_lie_where_the_kernel_reads_them() -> None:
    seqs = _sequences(3, top_p=0.25, top_k=7, min_p=0.5)
    temperatures, keys, max_gaps, top_ks, top_ps = Columns(
        _facts(seqs), np.arange(3), CPU, vocab_size=50, before=None
    ).at(np.arange(3))  # fmt: skip
    assert temperatures.tolist() == [0.5, 1.5, 2.5]
    assert top_ks.tolist() == [7] * 3
    assert top_ps.tolist() == [0.25] * 3
    assert max_gaps.tolist() == pytest.approx([np.log(2.0)] * 3)
    assert keys.shape == (3, 2)


def test_facts_are_the_same_object_while_the_sequences_are() -> None:
    builder, seqs = StepBuilder(16, 50), _sequences(3)
    first = _inputs(seqs, builder=builder).facts
    for seq in seqs:
        seq.token_ids.append(4)
        seq.num_computed_tokens += 1
    assert _inputs(seqs, builder=builder).facts is first
    assert _inputs(seqs[:2], builder=builder).facts is not first


def test_edits_are_known_by_position() -> None:
    plain, late, always = _sequences(2), _sequences(2, min_tokens=3), _sequences(2, logit_bias={1: 1.0})

    def edited_rows(seqs: list[Sequence], num_computed: int) -> list[int]:
        for seq in seqs:
            seq.num_computed_tokens, seq.token_ids = num_computed, [1] * (num_computed + 1)
        return [one.row for one in _inputs(seqs).edits]

    assert [edited_rows(seqs, 3) for seqs in (plain, late, always)] == [[], [0, 1], [0, 1]]
    assert edited_rows(late, 4) == []
    assert edited_rows(always, 1000) == [0, 1]
