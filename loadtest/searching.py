"""`python -m loadtest search`: one server, and a run for each rate that the search asks for."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys

from loadtest.compare.hosting import RunningHost
from loadtest.compare.measure import Case, measure
from loadtest.compare.progress import Progress
from loadtest.compare.runner import Plan
from loadtest.compare.search import Bounds, Hopelessness, RateSearch, judge
from loadtest.planning import workload_of
from loadtest.report.session import Measurement, Probe, Search
from loadtest.report.slo import ServiceLevel
from loadtest.workload.arrivals import OpenLoop

SETTLE_SECONDS = 1.0  # after a run that was ended early: until the server has noticed that nobody reads its answers


def bounds_of(options: argparse.Namespace) -> Bounds:
    """ValueError where they do not fit together."""
    return Bounds(
        start=options.start,
        lowest=options.lowest,
        highest=options.highest,
        precision=options.precision,
        num_confirmations=options.confirmations,
        max_runs=options.max_runs,
        max_seconds=math.inf if options.max_seconds is None else options.max_seconds,
    )


class Searcher:
    """Measures one server, which has begun, at the rates of a search. measurements: one for each run, in order"""

    def __init__(self, options: argparse.Namespace, host: RunningHost, level: ServiceLevel) -> None:
        if not level.limits:
            raise ValueError("a search needs limits: --slo ttft=1s,itl=100ms")
        self.measurements: list[Measurement] = []
        self.cases: list[Case] = []
        self.host = host
        self._options, self._level = options, level
        self._bounds = bounds_of(options)

    async def search(self) -> Search:
        return await RateSearch(self._run, self._bounds).search(self._level.limits)

    async def _run(self, rate: float, number: int) -> Probe:
        options = self._options
        num_requests = max(options.min_requests, math.ceil(rate * options.seconds))
        hopelessness = Hopelessness(self._level, num_requests)
        warmup = (2 if options.warmup is None else options.warmup) if number == 0 else 0
        plan = Plan(OpenLoop(rate), num_requests, None, warmup, is_hopeless=hopelessness)
        workload = workload_of(options, seed=options.seed + number)  # other prompts, which come at other times
        case = Case(f"{rate:.4g} requests/s", workload, plan)
        progress = Progress(case.name, num_requests, is_shown=True)
        try:
            measurement, _ = await measure(
                self.host.ready, case, round=number, service_level=self._level, progress=progress
            )
        finally:
            progress.close()
        if all(known.name != case.name for known in self.cases):
            self.cases.append(case)
        self.measurements.append(measurement)
        figures = measurement.figures
        is_cut = hopelessness.is_cut and figures.num_answers + figures.num_failures < num_requests
        probe = judge(rate, figures, self._level, num_planned=num_requests, is_cut=is_cut)
        print(f"{case.name}: {'good' if probe.is_good else probe.reason}", file=sys.stderr, flush=True)
        if is_cut:
            await asyncio.sleep(SETTLE_SECONDS)
        return probe
