"""Several servers in one run, in turns: A B C, A B C, ... so that what the machine does meanwhile meets all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loadtest.machine_load import busy_cores, wait_until_quiet
from loadtest.measure import Case, ReadyPeer, measure
from loadtest.progress import Progress
from loadtest.session import Measurement
from loadtest.slo import ServiceLevel


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


ProgressMaker = Callable[[str, int | None], Progress]


@dataclass(frozen=True)
class Comparison:
    """quietness: None takes every run as it comes"""

    peers: Sequence[ReadyPeer]
    cases: Sequence[Case]
    num_rounds: int
    service_level: ServiceLevel | None
    quietness: Quietness | None
    progress: ProgressMaker

    async def run(self) -> list[Measurement]:
        """All cases, all rounds, in the order in which they ran."""
        measurements: list[Measurement] = []
        for number, case in enumerate(self.cases):
            for round in range(self.num_rounds):
                for ready in self.peers:
                    stream = number * self.num_rounds + round  # no prompt comes twice, in another case either
                    measurements += await self._measure_in_quiet(ready, case, stream)
        return measurements

    async def _measure_in_quiet(self, ready: ReadyPeer, case: Case, stream: int) -> list[Measurement]:
        """One measurement, and before it those that were disturbed."""
        if self.quietness is None:
            return [await self._measure(ready, case, stream)]
        quiet, limit = self.quietness, self.quietness.max_busy_cores
        tries: list[Measurement] = []
        for repeat in range(quiet.num_repeats + 1):
            before = await wait_until_quiet(limit, patience=quiet.patience, window=quiet.window)
            measurement = await self._measure(ready, case, stream + repeat * _REPEAT_STREAMS)
            busy = max(before, await busy_cores(quiet.window))
            is_disturbed = busy >= limit
            tries.append(replace(measurement, busy_cores=busy, is_disturbed=is_disturbed))
            if not is_disturbed:
                break
        return tries

    async def _measure(self, ready: ReadyPeer, case: Case, stream: int) -> Measurement:
        progress = self.progress(f"{case.name} {ready.peer.name}", case.plan.num_requests)
        try:
            return await measure(ready, case, round=stream, service_level=self.service_level, progress=progress)
        finally:
            progress.close()


_REPEAT_STREAMS = 1 << 16
