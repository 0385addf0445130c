"""When requests arrive.

Closed loop: `concurrency` clients, each of which sends its next request when it has its answer. Open loop: requests
arrive at times that do not depend on the server, as users do; a server that falls behind meets a queue that grows. The
times are a Poisson process of a constant rate, one whose rate changes in phases, or those of a recorded trace.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClosedLoop:
    concurrency: int

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}"


@dataclass(frozen=True)
class OpenLoop:
    """A Poisson process of `rate` requests per second."""

    rate: float

    def __str__(self) -> str:
        return f"{self.rate:g} requests/s"

    def times(self, seed: int) -> Iterator[float]:
        """Seconds from the start to each arrival, without end."""
        return poisson_times(self.rate, seed)


@dataclass(frozen=True)
class Phase:
    """A part of a schedule: a Poisson process whose rate goes evenly from `first_rate` to `last_rate`, and bursts.

    seconds: how long it lasts; rates: requests per second; burst: requests that come at one moment, at the beginning
    and then every `burst_every` seconds
    """

    seconds: float
    first_rate: float = 0.0
    last_rate: float = 0.0
    burst: int = 0
    burst_every: float = math.inf

    @property
    def expected(self) -> float:
        """Requests of the Poisson process, on average."""
        return self.seconds * (self.first_rate + self.last_rate) / 2

    def time_of(self, number: float) -> float:
        """Seconds from the beginning of the phase until so many requests have come on average."""
        if self.first_rate == self.last_rate:
            return number / self.first_rate
        slope = (self.last_rate - self.first_rate) / self.seconds
        root = max(self.first_rate**2 + 2 * slope * number, 0.0)
        return 2 * number / (self.first_rate + math.sqrt(root))  # of the two forms, the one that never cancels

    def __str__(self) -> str:
        rate = f"{self.first_rate:g}/s" if self.first_rate == self.last_rate else ""
        parts = [rate or f"{self.first_rate:g} to {self.last_rate:g}/s"] if self.expected else []
        if self.burst:
            every = f" every {self.burst_every:g} s" if self.burst_every < self.seconds else ""
            parts.append(f"{self.burst} at once{every}")
        return f"{' and '.join(parts) or 'nothing'} for {self.seconds:g} s"


@dataclass(frozen=True)
class PhasedArrivals:
    """Phases, one after the other."""

    phases: Sequence[Phase]

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def scaled(self, factor: float) -> PhasedArrivals:
        """The same with rates so many times as high; bursts stay as large, and come so much more often."""
        return PhasedArrivals(
            [
                Phase(
                    phase.seconds,
                    phase.first_rate * factor,
                    phase.last_rate * factor,
                    phase.burst,
                    phase.burst_every / factor,
                )
                for phase in self.phases
            ]
        )

    def times(self, seed: int) -> Iterator[float]:
        """Seconds from the start to each arrival, rising, until the last phase ends."""
        return heapq.merge(self._poisson_times(seed), self._burst_times())

    def _poisson_times(self, seed: int) -> Iterator[float]:
        """Times of a process of rate 1, each moved to where as many have come on average (Lewis and Shedler 1979)."""
        begin = expected_before = 0.0
        numbers = poisson_times(1.0, seed)
        number = next(numbers)
        for phase in self.phases:
            while number < expected_before + phase.expected:
                yield begin + phase.time_of(number - expected_before)
                number = next(numbers)
            begin, expected_before = begin + phase.seconds, expected_before + phase.expected

    def _burst_times(self) -> Iterator[float]:
        begin = 0.0
        for phase in self.phases:
            if phase.burst:
                for index in range(max(math.ceil(phase.seconds / phase.burst_every), 1)):
                    yield from [begin + index * phase.burst_every if index else begin] * phase.burst
            begin += phase.seconds

    def __str__(self) -> str:
        return ", ".join(map(str, self.phases))


@dataclass(frozen=True)
class RecordedArrivals:
    """The times of a trace: seconds from the start, rising."""

    offsets: Sequence[float]
    name: str

    @property
    def seconds(self) -> float:
        return self.offsets[-1] if self.offsets else 0.0

    def times(self, seed: int) -> Iterator[float]:
        """Those of the trace, whatever the seed."""
        return iter(self.offsets)

    def __str__(self) -> str:
        return f"{self.name}, {len(self.offsets)} requests in {self.seconds:g} s"


Arrivals = ClosedLoop | OpenLoop | PhasedArrivals | RecordedArrivals


def poisson_times(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start to each arrival, without end: exponential gaps with mean 1/rate, drawn from the seed."""
    random = np.random.default_rng((seed, _ARRIVAL_STREAM))
    now = 0.0
    while True:
        for gap in random.exponential(1.0 / rate, size=256):
            now += float(gap)
            yield now


_ARRIVAL_STREAM = 0x0A221  # keeps these draws apart from those of the prompts, which use the same seed
