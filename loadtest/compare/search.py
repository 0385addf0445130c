"""The highest rate of arrivals at which a server keeps its limits: doubling, then bisection, then confirmation.

Goodput in the sense of DistServe (arXiv 2401.09670, section 2): requests per second within the limits. One run of a
rate is a sample, and runs near the border fall on either side of it; so the rate that bisection ends at must be good
again with other prompts and arrivals before it counts, and is given up for a lower one where it is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from loadtest.client.outcome import Answer, Failure, Outcome
from loadtest.report.session import Probe, Search
from loadtest.report.slo import ServiceLevel
from loadtest.report.statistics import Distribution, Figures

PERCENTILE = 99
MAX_FAILED = 0.01  # of the requests, that a good run may have
MAX_LATENESS = 0.05  # seconds by which this client may send late, or its own load is what is measured

Run = Callable[[float, int], Awaitable[Probe]]  # a rate, the number of the run -> what came of it


@dataclass(frozen=True)
class Bounds:
    """Where a search looks, and when it ends. rates in requests per second; precision: a share of the rate"""

    start: float = 1.0
    lowest: float = 0.01
    highest: float = 1000.0
    precision: float = 0.1
    num_confirmations: int = 2
    max_runs: int = 30
    max_seconds: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= self.start <= self.highest < math.inf:
            raise ValueError(
                f"the search begins at {self.start:g} requests/s, which must lie from --lowest ({self.lowest:g}) to "
                f"--highest ({self.highest:g})"
            )
        if not 0.005 <= self.precision <= 1:
            raise ValueError(f"a precision of {self.precision:g} cannot be reached; use 0.005 to 1")


@dataclass
class RateSearch:
    """Runs rates until one is confirmed. probes: what came of each run, in order"""

    run: Run
    bounds: Bounds
    clock: Callable[[], float] = time.monotonic
    probes: list[Probe] = field(default_factory=list)
    _good: list[float] = field(default_factory=list)  # rates that were good, rising
    _bad: float = math.inf  # the lowest that was not
    _started_at: float = 0.0

    async def search(self, limits: Mapping[str, float]) -> Search:
        """Raises what a run raises."""
        self._started_at = self.clock()
        best, stopped_by = await self._find()
        return Search(
            best=best,
            limits=dict(limits),
            percentile=PERCENTILE,
            precision=self.bounds.precision,
            num_confirmations=self.bounds.num_confirmations,
            probes=self.probes,
            stopped_by=stopped_by,
        )

    async def _find(self) -> tuple[float | None, str]:
        """The confirmed rate, if any, and why the search ended."""
        while True:
            if self._is_over():
                good = f"; {self._good[-1]:.3g} requests/s was good, unconfirmed" if self._good else ""
                return None, f"the search was ended after {self._spent()}, before any rate was confirmed{good}"
            rate = self._next() if self.probes else self.bounds.start
            if rate is not None:
                await self._try(rate)
            elif not self._good:
                return None, f"even {self.bounds.lowest:g} requests/s are too many"
            elif await self._confirm(self._good[-1]):
                return self._good[-1], self._why_no_higher()

    def _next(self) -> float | None:
        """The rate to try; None: good and bad rates are as close as is asked for, or there is nothing beyond."""
        bounds = self.bounds
        good = self._good[-1] if self._good else 0.0
        if math.isinf(self._bad):
            return min(2 * good, bounds.highest) if good < bounds.highest else None
        if not good:
            return max(self._bad / 2, bounds.lowest) if self._bad > bounds.lowest else None
        return None if self._bad <= good * (1 + bounds.precision) else math.sqrt(good * self._bad)

    async def _try(self, rate: float) -> None:
        probe = await self.run(rate, len(self.probes))
        self.probes.append(probe)
        if probe.is_good:
            self._good.append(rate)
            self._good.sort()
        else:
            self._bad = rate
            self._good = [good for good in self._good if good < rate]

    async def _confirm(self, rate: float) -> bool:
        """Whether the rate is good every time. False also where the search was over before that was known."""
        for _ in range(self.bounds.num_confirmations):
            if self._is_over():
                return False
            self._good.remove(rate)
            await self._try(rate)
            if not self.probes[-1].is_good:
                return False
        return True

    def _is_over(self) -> bool:
        bounds = self.bounds
        return len(self.probes) >= bounds.max_runs or self.clock() - self._started_at >= bounds.max_seconds

    def _spent(self) -> str:
        return f"{len(self.probes)} runs and {self.clock() - self._started_at:.0f} s"

    def _why_no_higher(self) -> str:
        if math.isinf(self._bad):
            return "higher ones were not asked for"
        reason = next(probe.reason for probe in reversed(self.probes) if probe.rate == self._bad and not probe.is_good)
        return f"at {self._bad:.3g} requests/s {reason}"


def judge(rate: float, figures: Figures, level: ServiceLevel, *, num_planned: int, is_cut: bool) -> Probe:
    """What a run says of its rate. num_planned: requests; of a run that was cut, not all have ended"""
    values = {name: value for name, value in _values(figures).items() if name in level.limits}
    reasons = [
        f"{name} p{PERCENTILE} is {1000 * values[name]:.0f} ms"
        for name, limit in level.limits.items()
        if values.get(name, 0.0) > limit
    ]
    if figures.num_failures > MAX_FAILED * num_planned:
        kinds = ", ".join(figures.errors)
        reasons.insert(0, f"{figures.num_failures} of {num_planned} requests failed ({kinds})")
    if not figures.num_answers and not reasons:
        reasons.append("nothing was answered")
    if figures.max_lateness > MAX_LATENESS:
        reasons.append(f"this client sent up to {1000 * figures.max_lateness:.0f} ms late: it is too slow for the rate")
    if is_cut and not reasons:
        reasons.append(f"too many requests were beyond a limit for the {PERCENTILE}th percentile of {num_planned}")
    return Probe(
        rate=rate,
        is_good=not reasons,
        reason=", ".join(reasons),
        is_cut=is_cut,
        values=values,
        num_answers=figures.num_answers,
        num_failures=figures.num_failures,
    )


def _values(figures: Figures) -> dict[str, float]:
    """The percentile that limits are for, of each of them, in seconds."""
    distributions: dict[str, Distribution | None] = {
        "ttft": figures.time_to_first_token,
        "tpot": figures.time_per_output_token,
        "itl": figures.inter_token_latency,
        "e2e": figures.end_to_end,
    }
    return {name: values.p99 for name, values in distributions.items() if values is not None}


@dataclass
class Hopelessness:
    """Whether a run can still become good: whether more requests than the percentile leaves out were beyond a limit.

    Shown every outcome. Tokens' waits are judged at the end: how many there will be is not known before.
    """

    level: ServiceLevel
    num_planned: int
    is_cut: bool = False
    _num_failed: int = 0
    _num_beyond: dict[str, int] = field(default_factory=dict)

    def __call__(self, outcome: Outcome) -> bool:
        if isinstance(outcome, Failure):
            self._num_failed += 1
        else:
            for name, value in _latencies(outcome).items():
                if value > self.level.limits.get(name, math.inf):
                    self._num_beyond[name] = self._num_beyond.get(name, 0) + 1
        allowed = math.floor((1 - PERCENTILE / 100) * (self.num_planned - 1)) + 1
        is_failing = self._num_failed > MAX_FAILED * self.num_planned
        self.is_cut = self.is_cut or is_failing or max(self._num_beyond.values(), default=0) > allowed
        return self.is_cut


def _latencies(answer: Answer) -> dict[str, float]:
    return {
        "ttft": answer.time_to_first_token,
        "tpot": answer.time_per_output_token or 0.0,
        "e2e": answer.end_to_end,
    }
