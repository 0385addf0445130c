"""Figures from outcomes, and the service level."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.client.outcome import Answer, Failure
from loadtest.report.slo import ServiceLevel, parse_service_level
from loadtest.report.statistics import Distribution, summarize


def answer(start: float, *, first: float, gap: float, num_tokens: int) -> Answer:
    """An answer whose tokens come at even gaps."""
    gaps = (gap,) * (num_tokens - 1)
    last = start + first + sum(gaps)
    return Answer(start, start, start + first, last, last, gaps, 10, 4, num_tokens, num_tokens + 2, False)


def test_percentiles_interpolate_between_the_closest_ranks() -> None:
    hundred = Distribution.of([float(i) for i in range(101)])
    assert (hundred.p50, hundred.p90, hundred.p99, hundred.max) == (50.0, 90.0, 99.0, 100.0)
    two = Distribution.of([10.0, 20.0])
    assert (two.p50, two.p90, two.p99) == pytest.approx((15.0, 19.0, 19.9))
    one = Distribution.of([3.0])
    assert (one.p50, one.p99, one.mean, one.count) == (3.0, 3.0, 3.0, 1)


def test_no_values_give_no_distribution() -> None:
    assert Distribution.of([]) is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_ordered_and_within_the_values(values: list[float]) -> None:
    of = Distribution.of(values)
    assert min(values) <= of.p50 <= of.p90 <= of.p99 <= of.max == max(values)


def test_rates_are_per_second_from_the_first_arrival_to_the_last_end() -> None:
    """Two answers of 11 tokens, one from 0 to 3 s and one from 1 to 5 s; a failure until 6 s lengthens the run."""
    answers = [answer(0.0, first=1.0, gap=0.2, num_tokens=11), answer(1.0, first=2.0, gap=0.2, num_tokens=11)]
    figures = summarize([*answers, Failure("cut", "", 2.0, 6.0)])
    assert figures.duration == 6.0
    assert figures.output_tokens_per_second == pytest.approx(22 / 6)
    assert figures.prompt_tokens_per_second == pytest.approx(20 / 6)
    assert figures.total_tokens_per_second == pytest.approx(42 / 6)
    assert figures.requests_per_second == pytest.approx(2 / 6)
    assert figures.time_to_first_token.p50 == pytest.approx(1.5)
    assert figures.time_per_output_token.p50 == pytest.approx(0.2)
    assert figures.end_to_end.max == pytest.approx(4.0)
    assert (figures.num_cached_tokens, figures.errors, figures.goodput) == (8, {"cut": 1}, None)


def test_nothing_but_failures_has_no_latencies_and_no_tokens() -> None:
    figures = summarize([Failure("connect", "", 0.0, 1.0), Failure("timeout", "", 0.0, 2.0)])
    assert (figures.num_answers, figures.output_tokens_per_second) == (0, 0.0)
    assert figures.time_to_first_token is figures.inter_token_latency is figures.end_to_end is None
    with pytest.raises(ValueError, match="at least one"):
        summarize([])


@pytest.mark.parametrize(
    ("limits", "num_kept"),
    [
        ("ttft=1s", 2),
        ("ttft=500ms", 1),
        ("itl=0.1", 1),
        ("tpot=250ms,e2e=2", 2),
        ("ttft=500ms,itl=150ms", 0),
        ("e2e=3", 3),
    ],
)
def test_goodput_counts_answers_that_keep_every_limit(limits: str, num_kept: int) -> None:
    answers = [
        answer(0.0, first=0.4, gap=0.2, num_tokens=6),
        answer(0.0, first=0.9, gap=0.1, num_tokens=6),
        answer(0.0, first=1.5, gap=0.3, num_tokens=6),
    ]
    figures = summarize([*answers, Failure("cut", "", 0.0, 3.0)], parse_service_level(limits))
    assert figures.goodput == pytest.approx(num_kept / 3.0)


def test_a_limit_between_tokens_means_the_longest_wait() -> None:
    one_stall = Answer(0.0, 0.0, 0.1, 1.2, 1.2, (0.1, 0.9, 0.1), 1, 0, 4, 6, False)
    assert ServiceLevel(tpot=0.4).is_kept_by(one_stall)
    assert not ServiceLevel(itl=0.4).is_kept_by(one_stall)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=fast", "latency=3", "ttft=1,,itl=2"])
def test_a_service_level_that_is_none_says_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match=r"ttft|milliseconds"):
        parse_service_level(text)
