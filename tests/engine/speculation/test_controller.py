"""How many drafts are verified: those that pay, learned from what came of all guesses."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.speculation.acceptance_model import DraftChances, Guess, Guesses, SequenceRecord, log_odds
from engine.speculation.controller import DraftController
from engine.speculation.step_costs import StepCosts
from tests.support.conformance.proposer import make_sequence

CHEAP, DEAR = {1: 1.0, 64: 1.05}, {1: 1.0, 64: 64.0}


def _controller(costs: dict[int, float], **fields: object) -> DraftController:
    return DraftController(StepCosts(costs), **({"max_rows": 64, "depth_costs_time": False} | fields))


def _draft(seq, tokens, parents=None) -> None:
    seq.draft_token_ids, seq.draft_parents = list(tokens), list(parents or range(-1, len(tokens) - 1))


def _live(controller: DraftController, share_right: float, steps: int = 400, confidence=lambda right: []) -> list[int]:
    """How many drafts were kept in each step of a text of random tokens, where guesses are right so often."""
    rng = random.Random(0)
    seq = make_sequence([0])
    kept = []
    for _ in range(steps):
        controller.judge([seq])
        right = [rng.random() < share_right for _ in range(4)]
        future = [rng.randrange(100) for _ in range(4)]
        _draft(seq, [token if ok else 100 for token, ok in zip(future, right, strict=True)])
        controller.choose([seq], [confidence(right)], 0)
        kept.append(len(seq.draft_token_ids))
        accepted = 0
        while accepted < kept[-1] and right[accepted]:
            accepted += 1
        seq.token_ids += future[: accepted + 1]
        seq.draft_token_ids, seq.draft_parents = [], []
    return kept


def test_where_rows_are_nearly_free_likely_drafts_are_verified() -> None:
    assert np.mean(_live(_controller(CHEAP), 0.9)[50:]) > 3.5


def test_where_a_row_costs_a_step_nothing_is_verified_unless_it_is_sure() -> None:
    assert np.mean(_live(_controller(DEAR), 0.6)[50:]) < 0.1


def test_what_was_never_verified_is_judged_too_so_that_better_times_are_noticed() -> None:
    controller = _controller({1: 1.0, 2: 1.6, 64: 30.0})
    assert np.mean(_live(controller, 0.05)[200:]) == 0
    assert np.mean(_live(controller, 0.97)[300:]) > 0.8


def test_confidence_that_tells_right_from_wrong_decides_draft_by_draft() -> None:
    """Half of the guesses are right, and the proposer knows which."""

    def confidence(right: list[bool]) -> list[float]:
        return [0.9 if ok else 0.1 for ok in right]

    controller = _controller({1: 1.0, 2: 1.5, 3: 2.0, 64: 30.0})
    kept = _live(controller, 0.5, steps=1500, confidence=confidence)
    assert 0.2 < np.mean(kept[500:]) < 2  # those that are surely right


def test_the_best_drafts_of_all_sequences_are_kept_and_trees_stay_whole() -> None:
    controller = _controller({1: 1.0, 6: 1.01, 7: 50.0, 512: 9000.0})
    sure, unsure = make_sequence([1]), make_sequence([2])
    _draft(sure, [1, 2, 3, 4], [-1, -1, 0, 2])
    _draft(unsure, [1, 2, 3])
    controller.choose([sure, unsure], [[0.95, 0.01, 0.95, 0.95], [0.3, 0.3, 0.3]], 0)
    assert (sure.draft_token_ids, sure.draft_parents) == ([1, 3, 4], [-1, 0, 1])
    assert unsure.draft_token_ids == [1]
    assert controller.num_chosen == 4


def test_no_more_rows_than_a_step_has() -> None:
    controller = _controller(CHEAP, max_rows=5)
    seqs = [make_sequence([i]) for i in range(3)]
    for seq in seqs:
        _draft(seq, [1, 2, 3, 4])
    controller.choose(seqs, [[0.9] * 4] * 3, 0)
    assert sum(len(seq.draft_token_ids) for seq in seqs) == 2
    for seq in seqs:
        _draft(seq, [1, 2, 3, 4])
    controller.choose(seqs, [[0.9] * 4] * 3, 10)
    assert all(not seq.draft_token_ids for seq in seqs)


def test_drafting_that_costs_more_than_it_gains_is_left_out_but_for_a_look_now_and_then() -> None:
    controller = _controller(CHEAP, depth_costs_time=True)
    controller.note_drafting(1, 4, 4 * 2.0)  # a pass of the draft model takes as long as two steps
    depths = [controller.depth(1, 0, 4) for _ in range(2000)]
    assert 2 < sum(depth > 0 for depth in depths) < 40
    assert controller.outcome == "too_slow"


@pytest.mark.parametrize(("share_right", "is_worth_it"), [(0.05, False), (0.9, True)])
def test_guesses_that_cost_time_are_made_only_where_drafts_gain_more(share_right: float, is_worth_it: bool) -> None:
    """A pass takes a tenth of a step, however many drafts it makes, and each row as much."""
    controller = _controller({1: 1.0, 64: 7.3})
    depths = []
    for _ in range(40):
        _live(controller, share_right, steps=20)
        depths.append(controller.depth(1, 0, 4))
        if depths[-1]:
            controller.note_drafting(1, 4, 0.1)
    assert np.mean([depth == 4 for depth in depths[5:]]) == (1.0 if is_worth_it else pytest.approx(0, abs=0.2))


def test_better_times_are_noticed_after_a_while_without_drafts() -> None:
    controller = _controller({1: 1.0, 64: 1.5})
    controller.note_drafting(1, 4, 0.1)
    _live(controller, 0.0, steps=100)
    num_steps = 0
    while controller.depth(1, 0, 4) == 0 or num_steps < 200:
        num_steps += 1
        assert num_steps < 1000
    for _ in range(10):  # from now on guesses are right
        while controller.depth(1, 0, 4) == 0:
            num_steps += 1
        controller.note_drafting(1, 4, 0.1)
        _live(controller, 1.0, steps=1)
    assert [controller.depth(1, 0, 4) for _ in range(20)][-1] == 4


def test_depth_is_limited_where_each_draft_costs_a_pass() -> None:
    controller = _controller(CHEAP, depth_costs_time=True)
    controller.note_drafting(1, 1, 0.2)
    assert 1 <= controller.depth(1, 0, 16) < 8
    controller = _controller(CHEAP, depth_costs_time=True)
    controller.note_drafting(1, 1, 0.001)
    assert controller.depth(1, 0, 16) == 16


def test_tokens_that_were_taken_back_leave_no_guess_behind() -> None:
    guesses, record, seq = Guesses(), SequenceRecord(), make_sequence([1, 2, 3, 4])
    record.pending.append(Guess(4, [9], [-1], [], 0.0))
    seq.token_ids = [1, 2]
    guesses.judge(seq, record)
    assert not record.pending


def test_a_guess_is_followed_along_the_branch_that_came_true() -> None:
    guesses, record = Guesses(), SequenceRecord(own_rate=0.5)
    seq = make_sequence([1])
    tree = Guess(1, [5, 6, 7, 8], [-1, -1, 1, 2], [1.0, 1.0, 1.0, 1.0], 1.0)
    record.pending.append(tree)
    for token in (6, 7):
        seq.token_ids.append(token)
        guesses.judge(seq, record)
        assert record.pending == [tree]
    seq.token_ids.append(0)
    guesses.judge(seq, record)
    assert not record.pending
    assert tree.depth == 2


@pytest.mark.parametrize("real", [0.1, 0.5, 0.9])
def test_chances_come_near_the_truth(real: float) -> None:
    rng, chances = random.Random(1), DraftChances()
    for _ in range(2000):
        chances.learn(log_odds(0.5), 0.0, 0, rng.random() < real)
    assert chances.chance(log_odds(0.5), 0.0, 0) == pytest.approx(real, abs=0.08)
