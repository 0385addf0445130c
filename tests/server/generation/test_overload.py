"""Admission under more load than there are seats for, in simulated time: who is taken, and how long it waits.

Requests take a seat each, for a time drawn from a distribution, in the order in which they were admitted.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from server.config import LimitsConfig
from server.errors import ApiError
from server.generation.admission import Admission, DrainRate

SEEDS = range(3)


class Seats:
    """An engine with so many seats, behind the admission; `now` is simulated."""

    def __init__(self, num_seats: int, mean_seconds: float, *, sigma: float, seed: int, **limits: float) -> None:
        """sigma: of the logarithm of how long requests last; 0: all equally long"""
        self.now = 0.0
        self.random = random.Random(seed)
        self.engine = SimpleNamespace(
            state="ready", num_waiting=0, num_waiting_tokens=0, num_running=0,
            num_background_waiting=0, num_background_waiting_tokens=0,
        )  # fmt: skip
        self.admission = Admission(
            self.engine,
            LimitsConfig(**{"max_queued_requests": 100_000, **limits}),
            DrainRate(clock=lambda: self.now),
            num_seats=lambda: num_seats,
            clock=lambda: self.now,
        )
        self.num_seats, self.mean_seconds, self.sigma = num_seats, mean_seconds, sigma
        self.waits: list[float] = []
        self.busy_seconds = 0.0
        self.num_refused = 0
        self._queue: list[tuple[float, object]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, time: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), do))

    def run(self, until: float = math.inf) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, do = heapq.heappop(self._events)
            do()

    def ask(self) -> float | None:
        """Seconds after which to come again; None: it was taken."""
        try:
            place = self.admission.admit(1, 1)
        except ApiError as error:
            self.num_refused += 1
            return error.retry_after
        place.__enter__()
        place.hand_over(1)
        self.engine.num_waiting += 1
        self._queue.append((self.now, place))
        self.at(self.now + 0.01, self._step)  # requests start with the next step
        return None

    def _step(self) -> None:
        while self._queue and self.engine.num_running < self.num_seats:
            came_at, place = self._queue.pop(0)
            self.engine.num_waiting -= 1
            self.engine.num_running += 1
            self.waits.append(self.now - came_at)
            drawn = self.random.lognormvariate(-(self.sigma**2) / 2, self.sigma) if self.sigma else 1.0
            seconds = self.mean_seconds * drawn
            self.busy_seconds += seconds
            self.at(self.now + seconds, lambda place=place, seconds=seconds: self._end(place, seconds))

    def _end(self, place, seconds: float) -> None:
        self.engine.num_running -= 1
        place.end(seconds)
        place.__exit__()
        self._step()

    def come_again(self, waits: list[float]) -> list[bool]:
        """Those who were told to wait so many seconds from now; which of them are taken then."""
        begun, taken = self.now, []
        for wait in waits:
            self.at(begun + wait, lambda: taken.append(self.ask() is None))
        self.run()
        return taken

    def arrivals(self, rate: float, seconds: float) -> None:
        """Open loop: nobody comes again."""
        time, end = self.now, self.now + seconds
        while (time := time + self.random.expovariate(rate)) < end:
            self.at(time, lambda: self.ask())
        self.run(end)


@pytest.mark.parametrize(("num_seats", "mean_seconds"), [(4, 1.0), (16, 2.0), (32, 6.0)])
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_seats_are_never_idle_and_waits_keep_their_limit_at_three_times_the_capacity(
    num_seats: int, mean_seconds: float, sigma: float
) -> None:
    waits: list[float] = []
    for seed in SEEDS:
        server = Seats(num_seats, mean_seconds, sigma=sigma, seed=seed, max_queue_seconds=2.0)
        capacity = num_seats / mean_seconds
        server.arrivals(0.9 * capacity, 60.0)
        first, busy = len(server.waits), server.busy_seconds
        server.arrivals(3.0 * capacity, 300.0)
        assert (server.busy_seconds - busy) / (num_seats * 300.0) > 0.95
        assert server.num_refused > capacity * 300.0
        waits += server.waits[first:]
    assert np.percentile(waits, 99) <= 2.2


@pytest.mark.parametrize(("num_seats", "mean_seconds"), [(4, 1.0), (16, 2.0), (32, 4.0)])
@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("bound", ["length", "wait"])
def test_those_of_a_burst_that_come_when_they_are_told_get_in_at_their_second_try(
    num_seats: int, mean_seconds: float, sigma: float, bound: str
) -> None:
    num_refused = num_at_second = 0
    for seed in SEEDS:
        limits = {"max_queued_requests": 2 * num_seats} if bound == "length" else {"max_queue_seconds": 4.0}
        server = Seats(num_seats, mean_seconds, sigma=sigma, seed=seed, **limits)
        server.arrivals(1.2 * num_seats / mean_seconds, 60.0)
        server.run()
        server.now += 30.0
        room = 2 * num_seats if bound == "length" else round(4.0 * num_seats / mean_seconds)
        waits = [server.ask() for _ in range(2 * (num_seats + room))]
        told = [math.ceil(wait) if number % 2 else wait for number, wait in enumerate(waits) if wait is not None]
        num_refused += len(told)
        num_at_second += sum(server.come_again(told))
    assert num_refused > 0
    assert num_at_second >= 0.95 * num_refused
