"""What a step costs by its rows."""

import random

import numpy as np
import pytest

from engine.speculation.step_costs import ROWS, StepCosts


def test_between_measured_sizes_and_beyond_them_costs_lie_on_lines() -> None:
    costs = StepCosts({1: 1.0, 5: 2.0, 9: 4.0})
    assert [costs.seconds(rows) for rows in (1, 3, 5, 7, 9)] == pytest.approx([1, 1.5, 2, 3, 4])
    assert costs.seconds(13) > 5
    assert costs.seconds(5000) > costs.seconds(512)
    assert (np.diff(costs.table()[1:]) >= 0).all()


@pytest.mark.parametrize("measured", [None, {}, {1: 3.0}, {4: 2.0, 1: 2.5, 8: 1.0}])
def test_costs_never_fall_with_rows_whatever_was_measured(measured: dict[int, float] | None) -> None:
    table = StepCosts(measured).table()
    assert min(table[1:]) > 0
    assert (np.diff(table[1:]) >= 0).all()


def test_steps_that_cost_otherwise_are_learned_through_noise() -> None:
    rng = random.Random(0)
    costs = StepCosts({1: 1.0, 4: 1.1, 8: 1.2})
    for _ in range(1500):
        rows = rng.choice([1, 4, 8])
        real = {1: 1.0, 4: 2.0, 8: 3.0}[rows]
        costs.learn(rows, real * rng.choice([1.0, 1.02, 0.98, 1.0, 6.0]))  # now and then, something was in the way
    assert costs.seconds(4) / costs.seconds(1) == pytest.approx(2.0, rel=0.15)
    assert costs.seconds(8) / costs.seconds(1) == pytest.approx(3.0, rel=0.15)


def test_a_machine_that_slows_down_is_no_reason_to_think_that_rows_are_free() -> None:
    costs = StepCosts({1: 1.0, 4: 2.0, 16: 5.0})
    for _ in range(500):
        costs.learn(1, 3.0)
    assert costs.seconds(1) == pytest.approx(3.0, rel=0.1)
    assert costs.seconds(4) / costs.seconds(1) > 1.5


def test_odd_readings_are_left_out() -> None:
    costs = StepCosts({1: 1.0, 2: 2.0})
    for rows, seconds in ((0, 1.0), (1, 0.0), (1, -1.0), (ROWS[-1] + 1, 9.0)):
        costs.learn(rows, seconds)
    assert costs.seconds(1) == 1.0
