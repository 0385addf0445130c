"""Several servers in one run, in turns: A B C, A B C, ... so that what the machine does meanwhile meets all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loadtest.client.outcome import Outcome
from loadtest.compare.hosting import RunningHost
from loadtest.compare.measure import Case, measure
from loadtest.compare.processes import busy_cores, pause, resume, wait_until_quiet
from loadtest.compare.progress import Progress
from loadtest.report.session import REPEAT_STREAMS, Measurement
from loadtest.report.slo import ServiceLevel

Watch = Callable[[Measurement, Mapping[int, Outcome]], None]


@dataclass(frozen=True)
class Quietness:
    """How quiet the machine must be, in cores in use by anything, just before and just after a run.

    A run that was not is repeated, `num_repeats` times at most. patience: seconds to wait for quiet before a run;
    window: seconds over which the use is averaged
    """

    max_busy_cores: float
    patience: float = 60.0
    window: float = 1.0
    num_repeats: int = 2


@dataclass(frozen=True)
class Comparison:
    """quietness: None takes every run as it comes
    freezes_idle: servers are paused while it is not their turn, and while the machine is looked at
    takes_one_at_a_time: a server does all cases of a round in one turn, so that it need not run in the others'
    watch: is shown every run when it has been measured, with its outcomes by the number of their exchange
    measurements: filled while it runs, in the order in which they were made
    """

    hosts: Sequence[RunningHost]
    cases: Sequence[Case]
    num_rounds: int
    service_level: ServiceLevel | None
    quietness: Quietness | None
    freezes_idle: bool = False
    takes_one_at_a_time: bool = False
    shows_progress: bool = False
    watch: Watch | None = None
    measurements: list[Measurement] = field(default_factory=list)

    async def run(self) -> list[Measurement]:
        """All cases, all rounds, in the order in which they ran. Servers that were started for it have ended."""
        try:
            for host in self.hosts:
                await host.begin()
                self._freeze(host)
            for host, work in self._turns():
                await host.open()
                self._freeze(host)
                for case, stream in work:
                    await self._measure_in_quiet(host, case, stream)
                await host.close()
        finally:
            for host in self.hosts:
                self._thaw(host)
                await host.end()
        return self.measurements

    def _turns(self) -> Iterator[tuple[RunningHost, list[tuple[Case, int]]]]:
        """What each host does in a turn: cases, each with the number of its stream of prompts.

        No prompt comes twice, in another round or another case either, and all servers get the same.
        """
        rounds = range(self.num_rounds)
        work = [[(case, i * self.num_rounds + round) for i, case in enumerate(self.cases)] for round in rounds]
        if self.takes_one_at_a_time:
            yield from ((host, cases) for cases in work for host in self.hosts)
        else:  # case by case, so that rounds of one case are close in time
            yield from ((host, [one]) for cases in zip(*work, strict=True) for one in cases for host in self.hosts)

    def _freeze(self, host: RunningHost) -> None:
        if self.freezes_idle and host.pid is not None:
            pause(host.pid)

    def _thaw(self, host: RunningHost) -> None:
        if self.freezes_idle and host.pid is not None:
            resume(host.pid)

    async def _measure_in_quiet(self, host: RunningHost, case: Case, stream: int) -> None:
        """One measurement, and before it those that were disturbed."""
        if self.quietness is None:
            self._keep(*await self._measure(host, case, stream))
            return
        quiet, limit = self.quietness, self.quietness.max_busy_cores
        for repeat in range(quiet.num_repeats + 1):
            before = await wait_until_quiet(limit, patience=quiet.patience, window=quiet.window)
            measurement, outcomes = await self._measure(host, case, stream + repeat * REPEAT_STREAMS)
            busy = max(before, await busy_cores(quiet.window))
            is_disturbed = busy >= limit
            self._keep(replace(measurement, busy_cores=busy, is_disturbed=is_disturbed), outcomes)
            if not is_disturbed:
                break

    def _keep(self, measurement: Measurement, outcomes: Mapping[int, Outcome]) -> None:
        self.measurements.append(measurement)
        if self.watch is not None:
            self.watch(measurement, outcomes)

    async def _measure(self, host: RunningHost, case: Case, stream: int) -> tuple[Measurement, dict[int, Outcome]]:
        progress = Progress(f"{case.name} {host.peer.name}", case.plan.num_requests, is_shown=self.shows_progress)
        self._thaw(host)
        try:
            return await measure(host.ready, case, round=stream, service_level=self.service_level, progress=progress)
        finally:
            self._freeze(host)
            progress.close()
