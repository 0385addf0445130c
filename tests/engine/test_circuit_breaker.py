"""What fails is left alone for a while, longer each time, and never for good."""

import random

from engine.circuit_breaker import CircuitBreaker


def steps_until_closed(breaker: CircuitBreaker) -> int:
    num_steps = 1
    while not breaker.step():
        num_steps += 1
    return num_steps


def test_a_failure_opens_it_until_so_many_quiet_steps_have_passed() -> None:
    breaker = CircuitBreaker(first_pause=8)
    assert not breaker.is_open
    breaker.trip()
    assert breaker.is_open
    assert steps_until_closed(breaker) == 8
    assert not breaker.is_open


def test_what_keeps_failing_is_tried_less_and_less_often_but_always_again() -> None:
    breaker = CircuitBreaker(first_pause=8, max_pause=100)
    pauses = []
    for _ in range(7):
        breaker.trip()
        pauses.append(steps_until_closed(breaker))
    assert pauses == [8, 16, 32, 64, 100, 100, 100]


def test_a_long_quiet_time_forgives() -> None:
    breaker = CircuitBreaker(first_pause=8)
    for _ in range(4):
        breaker.trip()
        steps_until_closed(breaker)
    for _ in range(1000):
        breaker.step()
    breaker.trip()
    assert steps_until_closed(breaker) == 8


def test_a_failure_while_it_is_open_starts_the_pause_anew() -> None:
    rng = random.Random(0)
    for _ in range(50):
        breaker = CircuitBreaker(first_pause=4)
        breaker.trip()
        num_failures = rng.randrange(1, 6)
        for _ in range(num_failures):
            for _ in range(rng.randrange(3)):
                breaker.step()
            breaker.trip()
        assert breaker.is_open
        assert steps_until_closed(breaker) == 4 * 2**num_failures
