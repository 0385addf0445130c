"""What a step takes by its rows and its contexts, learned from steps."""

import random

import pytest

from engine.scheduling.step_times import ContextCosts, StepTimes
from engine.scheduling.step_work import StepWork
from tests.support.paced_world import CONTEXTS, MEASURED, make_times, true_seconds


def decoding(num_streams: int, context: int) -> StepWork:
    return StepWork(num_streams, num_streams, num_streams * context, num_streams * context, [])


def error_at(times: StepTimes, work: StepWork) -> float:
    return abs(times.seconds(work) / true_seconds(work) - 1)


def test_before_any_step_the_rows_are_as_measured_and_contexts_as_guessed() -> None:
    times = make_times()
    alone = decoding(16, 0)
    assert times.seconds(alone) == pytest.approx(MEASURED[16])
    chunk = alone.with_chunk(1000, 48)
    expected = MEASURED[64] + CONTEXTS.pair * chunk.num_pairs + CONTEXTS.kv_token * 1048 - CONTEXTS.logits * 48
    assert times.seconds(chunk) == pytest.approx(expected)


def test_a_guess_of_contexts_is_made_of_what_rows_were_measured_to_take() -> None:
    guess = ContextCosts.guessed({1: 1.0, 11: 3.0}, flops_per_row=100, flops_per_pair=10, flops_per_logits=50)
    assert (guess.pair, guess.logits) == (pytest.approx(0.2 * 10 / 100), pytest.approx(0.2 * 50 / 100))
    flat = ContextCosts.guessed({1: 1.0, 64: 0.9}, flops_per_row=0, flops_per_pair=0, flops_per_logits=0)
    assert min(flat) > 0


@pytest.mark.parametrize("seed", range(5))
def test_steps_of_all_kinds_are_foretold_within_a_tenth_through_noise_and_outliers(seed: int) -> None:
    rng, times = random.Random(seed), make_times()
    for _ in range(600):
        work = decoding(rng.randrange(1, 24), rng.randrange(50, 2000))
        if rng.random() < 0.6:
            work = work.with_chunk(rng.randrange(6000), rng.randrange(8, 80))
        times.learn(work, true_seconds(work) * rng.choice([0.97, 1.0, 1.0, 1.03] * 20 + [9.0]))
    kinds = ((16, 300, 0, 64), (16, 300, 5900, 20), (4, 1500, 3000, 60), (1, 90, 0, 1))
    for streams, context, computed, chunk in kinds:
        work = decoding(streams, context).with_chunk(computed, chunk)
        assert error_at(times, work) < 0.1


def test_attention_that_costs_more_than_guessed_is_noticed_within_a_few_chunks_of_a_long_prompt() -> None:
    times = make_times()
    streams = decoding(16, 300)
    for number in range(20):
        work = streams.with_chunk(number * 40, 40)
        times.learn(work, true_seconds(work))
    assert error_at(times, streams.with_chunk(800, 40)) < 0.05
    assert error_at(times, streams.with_chunk(4000, 30)) < 0.2


def test_a_machine_that_slows_down_is_followed() -> None:
    times, work = make_times(), decoding(16, 300).with_chunk(500, 40)
    for _ in range(60):
        times.learn(work, 2 * true_seconds(work))
    assert times.seconds(work) == pytest.approx(2 * true_seconds(work), rel=0.1)
    for _ in range(120):
        times.learn(work, true_seconds(work))
    assert times.seconds(work) == pytest.approx(true_seconds(work), rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_readings_that_cannot_be_are_left_out(seconds: float) -> None:
    times, work = make_times(), decoding(4, 100)
    before = times.seconds(work)
    times.learn(work, seconds)
    times.learn(decoding(0, 0), 1.0)
    assert times.seconds(work) == before


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_learned_every_step_is_foretold_to_take_some_time(seed: int) -> None:
    rng, times = random.Random(seed), make_times()
    for _ in range(300):
        work = decoding(rng.randrange(1, 600), rng.choice([1, 100, 100_000]))
        work = work.with_chunk(rng.choice([0, 10**6]), rng.choice([0, 1, 20_000]))
        times.learn(work, 10.0 ** rng.uniform(-6, 3))
        seconds = times.seconds(decoding(rng.randrange(1, 20), rng.randrange(1, 4000)).with_chunk(100, 64))
        assert 0 < seconds < float("inf")
