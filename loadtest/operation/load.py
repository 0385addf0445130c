"""Measured load on a server: closed and open loops of random prompts, and what the server's memory did meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import psutil

from loadtest.client.client import Client, Target
from loadtest.client.outcome import Answer, Failure, Outcome
from loadtest.compare.processes import tree_of
from loadtest.compare.progress import Progress
from loadtest.compare.runner import Plan, run
from loadtest.operation.stage import Stage
from loadtest.workload.arrivals import ClosedLoop, OpenLoop
from loadtest.workload.lengths import parse_length
from loadtest.workload.prompts import Workload

LEAD = 0.2  # of a run, that is not counted: the queue has its length only then
REFUSED = "http_429"


@dataclass(frozen=True)
class Run:
    """The outcomes of one load, of which those count that ended after its lead and before its arrivals did."""

    outcomes: list[Outcome]
    began_at: float
    seconds: float

    @property
    def answers(self) -> list[Answer]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, Answer)]

    def failures(self, kind: str) -> list[Failure]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, Failure) and outcome.kind == kind]

    @property
    def other_failures(self) -> dict[str, int]:
        """By kind, all that are no refusals."""
        kinds = [outcome.kind for outcome in self.outcomes if isinstance(outcome, Failure)]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds) if kind != REFUSED}

    def _counted(self) -> list[Answer]:
        begin, end = self.began_at + LEAD * self.seconds, self.began_at + self.seconds
        return [answer for answer in self.answers if begin <= answer.finished_at < end]

    @property
    def answers_per_second(self) -> float:
        return len(self._counted()) / ((1 - LEAD) * self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Goodput: output tokens of whole answers."""
        return sum(answer.num_output_tokens for answer in self._counted()) / ((1 - LEAD) * self.seconds)

    def first_token_seconds(self, percentile: float) -> float:
        """Of all that were answered, from the moment at which they were due; NaN if none was."""
        return percentile_of([answer.time_to_first_token for answer in self.answers], percentile)


def percentile_of(values: list[float], percentile: float) -> float:
    return float(np.percentile(values, percentile)) if values else float("nan")


class Load:
    """Random prompts for one server. No two runs have prompts in common."""

    def __init__(self, stage: Stage, target: Target, *, prompt: str, output: str) -> None:
        """prompt, output: lengths in tokens, as on the command line (`128`, `lognormal:64:0.5`)"""
        self.target = target
        self._workload = Workload(
            parse_length(prompt),
            parse_length(output),
            seed=stage.options.seed,
            token_ids=(0, 255) if stage.is_counting else (1000, 30000),
        )
        self._num_runs = 0

    async def closed(self, num_clients: int, seconds: float) -> Run:
        return await self._run(Plan(ClosedLoop(num_clients), None, seconds, 0))

    async def open(self, rate: float, seconds: float) -> Run:
        """Raises RuntimeError for a rate of 0, that of a server that answered nothing before."""
        if not rate > 0:
            raise RuntimeError("nothing was answered while the capacity was measured; give a longer --duration")
        return await self._run(Plan(OpenLoop(rate), None, seconds, 0))

    async def _run(self, plan: Plan) -> Run:
        assert plan.duration is not None
        self._num_runs += 1
        workload = self._workload.of_stream(self._num_runs, None)
        began_at = time.perf_counter()
        async with Client(self.target) as client:
            outcomes = await run(client, workload, plan, progress=Progress())
        return Run(list(outcomes.values()), began_at, plan.duration)


@asynccontextmanager
async def watched_memory(pid: int, *, interval: float = 1.0) -> AsyncIterator[list[float]]:
    """Samples the resident memory of a process tree, bytes, into the list, once in an interval."""
    samples: list[float] = []

    async def sample() -> None:
        while True:
            with contextlib.suppress(psutil.Error):
                samples.append(float(sum(process.memory_info().rss for process in tree_of(pid))))
            await asyncio.sleep(interval)

    sampling = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling


def growth(samples: list[float], *, begin: float) -> float:
    """How much more the last tenth of the samples is than the tenth behind `begin`, a share of all; 0 of too few."""
    first = int(begin * len(samples))
    width = max(len(samples) // 10, 1)
    if len(samples) < first + 2 * width:
        return 0.0
    early, late = float(np.median(samples[first : first + width])), float(np.median(samples[-width:]))
    return late / early - 1.0
