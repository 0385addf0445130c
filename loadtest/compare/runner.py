"""One measured run: warm-up, arrivals, outcomes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loadtest.client.client import Client
from loadtest.client.outcome import Answer, Failure, Outcome
from loadtest.compare.progress import Progress
from loadtest.workload.arrivals import Arrivals, ClosedLoop, OpenLoop, PhasedArrivals, RecordedArrivals
from loadtest.workload.prompts import AnyWorkload, Exchange

TURNS = 1 << 40  # between the numbers of a conversation's turns

Hopeless = Callable[[Outcome], bool]


@dataclass(frozen=True)
class Plan:
    """The arrivals, length and warm-up of a run.

    It ends after `num_requests`, or when no more are to be sent after `duration` seconds. At least
    one of the two is given where arrivals have no end. num_warmup_requests: sent before, `concurrency` (or 8) at once,
    and not counted. Of conversations the first turns count here; the others follow.

    is_hopeless: shown every outcome; once it says so, the run ends at once, without what is still in flight
    """

    arrivals: Arrivals
    num_requests: int | None
    duration: float | None
    num_warmup_requests: int
    is_hopeless: Hopeless | None = None

    def __post_init__(self) -> None:
        ends = isinstance(self.arrivals, PhasedArrivals | RecordedArrivals)
        if self.num_requests is None and self.duration is None and not ends:
            raise ValueError("the run would never end; give the number of requests, the seconds, or both")


async def run(client: Client, workload: AnyWorkload, plan: Plan, *, progress: Progress) -> dict[int, Outcome]:
    """Warms up and measures. The outcomes by the number of their exchange, in the order in which they ended: the turns
    of a conversation after the first are numbered by `index_of`'s way.

    Raises RuntimeError, with the reason, if all warm-up requests failed: the measurement would be of nothing.
    """
    if plan.num_warmup_requests:
        await _warm_up(client, workload, plan)
    runner = _Runner(client, workload, plan, progress)
    running = asyncio.ensure_future(
        runner.run_closed(plan.arrivals.concurrency)
        if isinstance(plan.arrivals, ClosedLoop)
        else runner.run_open(plan.arrivals)
    )
    giving_up = asyncio.ensure_future(runner.is_hopeless.wait())
    try:
        await asyncio.wait((running, giving_up), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running  # raises what it raised
    finally:
        for task in (running, giving_up):
            task.cancel()
        await asyncio.gather(running, giving_up, return_exceptions=True)
    return runner.outcomes


def index_of(number: int) -> tuple[int, int]:
    """The index of a workload's exchange, and the turn, by the number of an outcome."""
    return number % TURNS, number // TURNS


def warmup_workload(workload: AnyWorkload) -> AnyWorkload:
    """The same lengths with prompts that the measured part does not have."""
    return workload.of_stream(workload.stream + _WARMUP_STREAMS, workload.text)


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
        self.is_hopeless = asyncio.Event()
        self._client = client
        self._workload = workload
        self._plan = plan
        self._progress = progress
        self._start = time.perf_counter()

    async def run_closed(self, concurrency: int) -> None:
        indexes = self._indexes()
        await asyncio.gather(*(self._send_one_after_another(indexes) for _ in range(concurrency)))

    async def run_open(self, arrivals: OpenLoop | PhasedArrivals | RecordedArrivals) -> None:
        """Each request is sent at its time, whatever became of the earlier ones.

        Its latency counts from that time even if this process was late: nothing is forgiven to a server, or to the
        client, that stalls (Tene, "How NOT to Measure Latency": coordinated omission).
        """
        async with asyncio.TaskGroup() as tasks:
            for index, offset in enumerate(arrivals.times(self._workload.seed)):
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
        """A conversation, which for most workloads is one exchange. It ends with a turn that fails."""
        exchange, turn = self._workload.exchange(index), 0
        while True:
            outcome = await self._send_one(index + turn * TURNS, exchange, intended_at)
            if not isinstance(outcome, Answer):
                return
            following = self._workload.follow_up(index, turn, exchange, outcome.text)
            if following is None:
                return
            exchange, turn = following.exchange, turn + 1
            intended_at = outcome.finished_at + following.think_seconds
            await asyncio.sleep(max(intended_at - time.perf_counter(), 0.0))

    async def _send_one(self, number: int, exchange: Exchange, intended_at: float | None) -> Outcome:
        self._progress.sent()
        outcome = await self._client.send(exchange, intended_at=intended_at)
        self.outcomes[number] = outcome
        self._progress.ended(outcome)
        if self._plan.is_hopeless is not None and self._plan.is_hopeless(outcome):
            self.is_hopeless.set()
        return outcome


_WARMUP_STREAMS = 1 << 20
