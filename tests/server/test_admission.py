"""Who may enter the queue, and when the others should come back."""

import random
from types import SimpleNamespace

import pytest

from engine.messages import Failed
from server.admission import MAX_RETRY_AFTER, UNKNOWN_DRAIN_RETRY_AFTER, Admission, DrainRate
from server.config import LimitsConfig
from server.errors import ApiError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(*, waiting: int = 0, tokens: int = 0, requests: int = 4, max_tokens: int = 100, state: str = "ready"):
    engine = SimpleNamespace(
        state=state, phase="weights", phase_detail="98 MB", failure=None,
        num_waiting=waiting, num_waiting_tokens=tokens,
    )  # fmt: skip
    clock = Clock()
    drain_rate = DrainRate(clock=clock)
    limits = LimitsConfig(max_queued_requests=requests, max_queued_tokens=max_tokens)
    return SimpleNamespace(
        admission=Admission(engine, limits, drain_rate), engine=engine, clock=clock, drain_rate=drain_rate
    )


def refusal(parts: SimpleNamespace, num_requests: int, num_tokens: int) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parts.admission.admit(num_requests, num_tokens)
    return caught.value


def test_the_queue_takes_requests_up_to_its_limit_and_not_one_more():
    parts = make(waiting=3, tokens=3)
    parts.admission.admit(1, 1)
    error = refusal(parts, 2, 2)
    assert (error.status, error.code, error.type) == (429, "queue_full", "rate_limit_error")
    assert "limits.max_queued_requests (4)" in error.message
    parts.engine.num_waiting = 4
    assert refusal(parts, 1, 1).status == 429


def test_the_queue_takes_tokens_up_to_its_limit_and_not_one_more():
    parts = make(waiting=2, tokens=60)
    parts.admission.admit(1, 40)
    error = refusal(parts, 1, 41)
    assert error.status == 429
    assert "limits.max_queued_tokens (100)" in error.message


def test_an_empty_queue_takes_what_could_never_fit_better():
    make().admission.admit(512, 10**9)


def test_a_restarting_engine_keeps_its_queue_open():
    make(state="restarting").admission.admit(1, 1)


@pytest.mark.parametrize(
    ("state", "code"), [("starting", "starting"), ("failed", "engine_down"), ("stopped", "engine_down")]
)
def test_an_engine_that_cannot_generate_is_503(state, code):
    parts = make(state=state)
    error = refusal(parts, 1, 1)
    assert (error.status, error.code) == (503, code)
    assert error.retry_after >= 1


def test_the_phase_of_the_start_is_told():
    assert "weights 98 MB" in refusal(make(state="starting"), 1, 1).message


def test_the_kind_of_a_failure_is_told_but_not_its_details():
    parts = make(state="failed")
    parts.engine.failure = Failed("memory", "/secret/path does not fit")
    message = refusal(parts, 1, 1).message
    assert "memory" in message
    assert "secret" not in message


def test_a_closed_queue_is_503_whatever_the_engine_does():
    for state in ("starting", "ready", "restarting", "failed"):
        parts = make(state=state)
        parts.admission.close()
        assert (refusal(parts, 1, 1).status, refusal(parts, 1, 1).code) == (503, "draining")


def test_without_a_measurement_there_is_a_modest_guess():
    assert refusal(make(waiting=4), 1, 1).retry_after == UNKNOWN_DRAIN_RETRY_AFTER


@pytest.mark.parametrize("rate", [0.5, 2.0, 20.0])
def test_retry_after_is_the_time_that_the_excess_takes_to_drain(rate):
    parts = make(waiting=10, requests=10)
    for _ in range(int(60 * rate)):
        parts.clock.now += 1 / rate
        parts.drain_rate.count()
    assert parts.drain_rate.per_second() == pytest.approx(rate, rel=0.15)
    error = refusal(parts, 8, 8)
    assert error.retry_after == pytest.approx(min(8 / rate, MAX_RETRY_AFTER), rel=0.15)


def test_retry_after_for_tokens_counts_the_requests_that_hold_them():
    parts = make(waiting=10, tokens=100, requests=1000)  # 10 tokens each
    for _ in range(60):
        parts.clock.now += 1.0
        parts.drain_rate.count()
    assert refusal(parts, 1, 40).retry_after == pytest.approx(4.0, rel=0.15)


def test_a_queue_that_stands_still_sends_clients_further_away_but_not_for_ever():
    parts = make(waiting=4)
    for _ in range(30):
        parts.clock.now += 1.0
        parts.drain_rate.count()
    before = refusal(parts, 1, 1).retry_after
    waits = []
    for _ in range(6):
        parts.clock.now += 10.0
        waits.append(refusal(parts, 1, 1).retry_after)
    assert before < waits[0] < waits[1]
    assert waits == sorted(waits)
    assert waits[-1] == MAX_RETRY_AFTER  # the SDKs ignore longer ones


def test_the_drain_rate_follows_random_arrivals():
    generator = random.Random(1)
    clock = Clock()
    drain_rate = DrainRate(window=50.0, clock=clock)
    assert drain_rate.per_second() == 0.0
    for _ in range(2000):
        clock.now += generator.expovariate(5.0)
        drain_rate.count()
    assert drain_rate.per_second() == pytest.approx(5.0, rel=0.25)
