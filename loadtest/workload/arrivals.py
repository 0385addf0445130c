"""When requests arrive.

Closed loop: `concurrency` clients, each of which sends its next request when it has its answer. Open loop: requests
arrive at times that do not depend on the server, as users do; a server that falls behind meets a queue that grows.
"""

from __future__ import annotations

from collections.abc import Iterator
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


Arrivals = ClosedLoop | OpenLoop


def poisson_times(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start to each arrival, without end: exponential gaps with mean 1/rate, drawn from the seed."""
    random = np.random.default_rng((seed, _ARRIVAL_STREAM))
    now = 0.0
    while True:
        for gap in random.exponential(1.0 / rate, size=256):
            now += float(gap)
            yield now


_ARRIVAL_STREAM = 0x0A221  # keeps these draws apart from those of the prompts, which use the same seed
