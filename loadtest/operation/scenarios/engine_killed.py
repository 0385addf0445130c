"""The engine's process is killed (SIGKILL), again and again, under load: clients see a pause and nothing else."""

from __future__ import annotations

import asyncio
import random

from loadtest.operation.disturbance import check_afterwards, check_all_answered, disturb, warmed_up
from loadtest.operation.stage import Stage

SECONDS, SECONDS_PER_KILL = 20.0, 5.0
PATIENCE = 90.0  # seconds


async def run(stage: Stage) -> None:
    async with stage.serve("supervision.max_deaths=50") as served:
        crowd = stage.crowd(served)
        before = await warmed_up(stage, served, crowd)
        chance, seconds = random.Random(stage.options.seed), stage.seconds(SECONDS)
        times = max(round(seconds / SECONDS_PER_KILL), 1)

        async def kill() -> None:
            for number in range(1, times + 1):
                await served.replace_engine(number, patience=PATIENCE, what="the engine that was killed is back")
                await asyncio.sleep(chance.uniform(0.0, 2.0))

        account = await disturb(crowd, kill, at_least=seconds)
        deaths = (await served.counters()).total("peregrine_engine_deaths_total")
        stage.findings.check("as many deaths are counted as there were", deaths == times, deaths)
        check_all_answered(stage, account)
        await check_afterwards(stage, served, crowd, before)
