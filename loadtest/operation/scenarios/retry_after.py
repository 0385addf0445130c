"""A burst of twice what the server takes, then silence: the Retry-After of a refusal turns out right.

At least 95% of those that were refused and come again when they were told, get in at that second try. Half of them
read whole seconds (`Retry-After`), half milliseconds (`retry-after-ms`), as the SDKs do. Once where the queue is
bounded by its length, and once where by the wait.
"""

from __future__ import annotations

import asyncio
import math
import random

from loadtest.client.client import Client
from loadtest.client.outcome import Answer, Failure
from loadtest.operation.load import REFUSED, Load, percentile_of
from loadtest.operation.served import ServedModel
from loadtest.operation.stage import Stage
from loadtest.workload.prompts import Exchange

SECONDS = 45.0  # of load before, from which the server knows how fast it is
QUEUE_SECONDS = 4.0
SHARE = 0.95
PATIENCE = 120.0  # seconds


async def run(stage: Stage) -> None:
    seats = stage.options.num_clients
    bounds = {"length": f"limits.max_queued_requests={2 * seats}", "wait": f"limits.max_queue_seconds={QUEUE_SECONDS}"}
    for name, bound in bounds.items():
        async with stage.serve(bound, f"scheduler.max_num_seqs={seats}", has_whole_memory=True) as served:
            await _burst(stage, served, name)


async def _burst(stage: Stage, served: ServedModel, name: str) -> None:
    seats = stage.options.num_clients
    load = Load(stage, stage.target(served), prompt="lognormal:96:0.4", output="lognormal:48:0.5")
    before = await load.closed(seats + seats // 2, stage.seconds(SECONDS))
    await served.wait_for(lambda counters: counters.is_idle, patience=PATIENCE, what="the server became idle")
    room = 2 * seats if name == "length" else round(QUEUE_SECONDS * before.answers_per_second)
    clients = await _ask_all(stage, served, 2 * (seats + room), tries=3)
    refused = [(waits, is_in) for waits, is_in in clients if waits]
    at_second = sum(len(waits) == 1 and is_in for waits, is_in in refused)
    share = at_second / len(refused) if refused else 0.0
    waits = [waits[0] for waits, _ in refused]
    stage.findings.check(
        f"queue bounded by its {name}: of those refused, at least {SHARE:.0%} get in at their second try",
        bool(refused) and share >= SHARE,
        f"{at_second} of {len(refused)} ({share:.1%}), of a burst of {len(clients)}",
    )
    stage.findings.note(
        **{
            f"{name}_burst": len(clients),
            f"{name}_num_refused": len(refused),
            f"{name}_num_at_second": at_second,
            f"{name}_num_never": sum(not is_in for _, is_in in refused),
            f"{name}_median_wait": percentile_of(waits, 50),
            f"{name}_longest_wait": max(waits, default=0.0),
        }
    )


async def _ask_all(stage: Stage, served: ServedModel, count: int, *, tries: int) -> list[tuple[list[float], bool]]:
    """For each of so many clients that come at once: the seconds that it was told to wait, each time, and whether it
    got in at last. Raises RuntimeError where one fails in another way."""
    draw = random.Random(stage.options.seed + count)
    exchanges = stage.exchanges(count, num_words=20)
    lengths = [max(int(draw.lognormvariate(math.log(48), 0.5)), 4) for _ in exchanges]
    async with Client(stage.target(served)) as client:

        async def ask(number: int) -> tuple[list[float], bool]:
            waits: list[float] = []
            for _ in range(tries):
                outcome = await client.send(Exchange(exchanges[number].prompt, lengths[number]))
                if isinstance(outcome, Answer):
                    return waits, True
                wait = _told_wait(outcome)
                waits.append(math.ceil(wait) if number % 2 else wait)
                if len(waits) < tries:
                    await asyncio.sleep(waits[-1])
            return waits, False

        return await asyncio.gather(*(ask(number) for number in range(count)))


def _told_wait(outcome: Failure) -> float:
    if outcome.kind != REFUSED or outcome.retry_after is None:
        raise RuntimeError(f"a request of the burst failed: {outcome.kind}: {outcome.detail}")
    return outcome.retry_after
