"""A proposer that fails costs its drafts, and nobody a request."""

from __future__ import annotations

import pytest
import torch

from engine.speculation.controller import DraftController
from engine.speculation.proposer import ProposerNeeds
from engine.speculation.speculator import MAX_STRANGE, Speculator
from engine.speculation.step_costs import StepCosts
from engine.speculation.verified_step import VerifiedStep
from engine.types import Sampled, Scheduled, Sequence
from tests.support.conformance.proposer import make_sequence


class Scripted:
    needs = ProposerNeeds(num_drafts=3)

    def __init__(self, tokens: list[int], parents: list[int], confidences: list[float] | None = None) -> None:
        self.tokens, self.parents, self.confidences = tokens, parents, confidences or []
        self.num_calls = 0

    def propose(self, step: VerifiedStep) -> None:
        self.num_calls += 1
        for seq in step.drafting:
            seq.draft_token_ids, seq.draft_parents = list(self.tokens), list(self.parents)
            seq.draft_confidences = list(self.confidences)


def _step(speculator: Speculator) -> Sequence:
    seq = make_sequence([1, 2, 3])
    speculator.propose([Scheduled(seq, 1, 0, samples=True)], [Sampled([3])], torch.zeros(1, 4))
    return seq


@pytest.mark.parametrize(
    ("tokens", "parents", "confidences"),
    [
        ([10], [-1], []),
        ([-1], [-1], []),
        ([1, 2], [-1], []),
        ([1, 2], [-1, 1], []),
        ([1, 2], [1, -1], []),
        ([1], [-2], []),
        ([1, 2, 3, 4], [-1, 0, 1, 2], []),
        ([1, 2], [-1, 0], [0.5]),
        ([1, 2], [-1, 0], [0.5, float("nan")]),
    ],
)
def test_nonsense_is_dropped_and_its_proposer_left_out_for_a_while(
    tokens: list[int], parents: list[int], confidences: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    proposer = Scripted(tokens, parents, confidences)
    speculator = Speculator(proposer, 10)
    for num_steps in range(1, MAX_STRANGE + 1):
        seq = _step(speculator)
        assert (seq.draft_token_ids, seq.draft_parents) == ([], [])
        assert speculator.outcome == "failed"
        assert speculator.is_off == (num_steps == MAX_STRANGE)
    assert "the proposer failed" in caplog.text
    for _ in range(20):
        assert _step(speculator).draft_token_ids == []
    assert proposer.num_calls == MAX_STRANGE
    proposer.tokens, proposer.parents, proposer.confidences = [7], [-1], []
    for _ in range(64):
        seq = _step(speculator)
    assert seq.draft_token_ids == [7]
    assert not speculator.is_off


def test_what_is_well_formed_passes() -> None:
    seq = _step(Speculator(Scripted([1, 2, 3], [-1, -1, 1], [0.5, 0.2, 0.9]), 10))
    assert (seq.draft_token_ids, seq.draft_parents) == ([1, 2, 3], [-1, -1, 1])


def test_drafts_that_nobody_asked_for_are_looked_at_all_the_same() -> None:
    controller = DraftController(StepCosts(), max_rows=64, depth_costs_time=False)
    controller.note_drafting(1, 1, 100.0)  # too slow to be worth any
    speculator = Speculator(Scripted([10], [-1]), 10, controller)
    assert _step(speculator).draft_token_ids == []
    assert speculator.outcome == "failed"


class StrangeForSome:
    """Nonsense for sequences whose text begins with 9, and a draft for the others."""

    needs = ProposerNeeds(num_drafts=3)

    def __init__(self) -> None:
        self.num_asked = 0

    def propose(self, step: VerifiedStep) -> None:
        for seq in step.drafting:
            is_strange = seq.token_ids[0] == 9
            self.num_asked += is_strange
            seq.draft_run([3], [float("nan") if is_strange else 0.9])


@pytest.mark.parametrize("is_auto", [False, True])
def test_nonsense_for_some_sequences_costs_no_other_its_drafts(is_auto: bool) -> None:
    controller = DraftController(StepCosts({1: 1.0, 512: 1.001}), max_rows=64, depth_costs_time=False)
    proposer = StrangeForSome()
    speculator = Speculator(proposer, 10, controller if is_auto else None)
    strange, sound = [make_sequence([9, 2, 3]) for _ in range(2 * MAX_STRANGE)], make_sequence([1, 2, 3])
    batch = [Scheduled(seq, 1, 0, samples=True) for seq in (*strange, sound)]
    for _ in range(60):
        speculator.propose(batch, [Sampled([3])] * len(batch), None)
        assert sound.draft_token_ids == [3]
        assert not any(seq.draft_token_ids for seq in strange)
        assert speculator.outcome == "drafted"
        assert not speculator.is_off
        for seq in (*strange, sound):
            seq.token_ids.append(3)
            seq.draft_run([], [])
    assert proposer.num_asked == len(strange)  # who had nonsense is left out for a while
    for _ in range(80):
        speculator.propose(batch, [Sampled([3])] * len(batch), None)
    assert proposer.num_asked == 2 * len(strange)


def test_one_confidence_that_is_no_number_spoils_no_later_draft() -> None:
    controller = DraftController(StepCosts({1: 1.0, 512: 1.001}), max_rows=64, depth_costs_time=False)
    proposer = Scripted([3], [-1], [float("nan")])
    speculator = Speculator(proposer, 10, controller)
    seq = make_sequence([1, 2, 3])
    for _ in range(200):
        speculator.propose([Scheduled(seq, 1, 0, samples=True)], [Sampled([3])], None)
        seq.token_ids.append(3)
        proposer.confidences = [0.9]
    assert seq.draft_token_ids == [3]
