"""One measured run: warm-up, arrivals, outcomes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from loadtest.client.client import Client
from loadtest.client.outcome import Failure, Outcome
from loadtest.compare.progress import Progress
from loadtest.workload.arrivals import Arrivals, ClosedLoop, OpenLoop, poisson_times
from loadtest.workload.written import AnyWorkload


@dataclass(frozen=True)
class Plan:
    """The arrivals, length and warm-up of a run.

    It ends after `num_requests`, or when no more are to be sent after `duration` seconds. At least
    one of the two is given. num_warmup_requests: sent before, `concurrency` (or 8) at once, and not counted
    """

    arrivals: Arrivals
    num_requests: int | None
    duration: float | None
    num_warmup_requests: int

    def __post_init__(self) -> None:
        if self.num_requests is None and self.duration is None:
            raise ValueError("the run would never end; give the number of requests, the seconds, or both")


async def run(client: Client, workload: AnyWorkload, plan: Plan, *, progress: Progress) -> dict[int, Outcome]:
    """Warms up and measures. The outcomes by the number of their exchange, in the order in which they ended.

    Raises RuntimeError, with the reason, if all warm-up requests failed: the measurement would be of nothing.
    """
    if plan.num_warmup_requests:
        await _warm_up(client, workload, plan)
    runner = _Runner(client, workload, plan, progress)
    if isinstance(plan.arrivals, ClosedLoop):
        await runner.run_closed(plan.arrivals.concurrency)
    else:
        await runner.run_open(plan.arrivals)
    return runner.outcomes


def warmup_workload(workload: AnyWorkload) -> AnyWorkload:
    """The same lengths with prompts that the measured part does not have."""
    return replace(workload, stream=workload.stream + _WARMUP_STREAMS)


async def _warm_up(client: Client, workload: AnyWorkload, plan: Plan) -> None:
    concurrency = plan.arrivals.concurrency if isinstance(plan.arrivals, ClosedLoop) else 8
    warmup = _Runner(
        client, warmup_workload(workload), Plan(ClosedLoop(concurrency), plan.num_warmup_requests, None, 0), Progress()
    )
    await warmup.run_closed(concurrency)
    failures = [outcome for outcome in warmup.outcomes.values() if isinstance(outcome, Failure)]
    if len(failures) == len(warmup.outcomes):
        raise RuntimeError(
            f"{client.target.base_url}: all {len(failures)} warm-up requests failed; "
            f"the first: {failures[0].kind}: {failures[0].detail}"
        )


class _Runner:
    def __init__(self, client: Client, workload: AnyWorkload, plan: Plan, progress: Progress) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self._client = client
        self._workload = workload
        self._plan = plan
        self._progress = progress
        self._start = time.perf_counter()

    async def run_closed(self, concurrency: int) -> None:
        indexes = self._indexes()
        await asyncio.gather(*(self._send_one_after_another(indexes) for _ in range(concurrency)))

    async def run_open(self, arrivals: OpenLoop) -> None:
        """Each request is sent at its time, whatever became of the earlier ones.

        Its latency counts from that time even if this process was late: nothing is forgiven to a server, or to the
        client, that stalls (Tene, "How NOT to Measure Latency": coordinated omission).
        """
        async with asyncio.TaskGroup() as tasks:
            for index, offset in enumerate(poisson_times(arrivals.rate, self._workload.seed)):
                if self._is_over(index, offset):
                    break
                intended_at = self._start + offset
                delay = intended_at - time.perf_counter()
                if delay > 0:
                    await asyncio.sleep(delay)
                tasks.create_task(self._send(index, intended_at))

    def _indexes(self) -> Iterator[int]:
        index = 0
        while not self._is_over(index, time.perf_counter() - self._start):
            yield index
            index += 1

    def _is_over(self, num_sent: int, seconds: float) -> bool:
        plan = self._plan
        return (plan.num_requests is not None and num_sent >= plan.num_requests) or (
            plan.duration is not None and seconds >= plan.duration
        )

    async def _send_one_after_another(self, indexes: Iterator[int]) -> None:
        for index in indexes:
            await self._send(index, None)

    async def _send(self, index: int, intended_at: float | None) -> None:
        self._progress.sent()
        outcome = await self._client.send(self._workload.exchange(index), intended_at=intended_at)
        self.outcomes[index] = outcome
        self._progress.ended(outcome)


_WARMUP_STREAMS = 1 << 20
