"""Steps run out of memory under load: they are taken in smaller parts, and every answer is what it should be."""

from __future__ import annotations

import asyncio

from loadtest.operation.disturbance import check_afterwards, check_all_answered, disturb, warmed_up
from loadtest.operation.stage import Stage

TIMES = 6
PATIENCE = 60.0  # seconds


async def run(stage: Stage) -> None:
    async with stage.serve("supervision.max_deaths=20", obeys_orders=True) as served:
        crowd = stage.crowd(served)
        before = await warmed_up(stage, served, crowd)

        async def run_out() -> None:
            for number in range(TIMES):
                served.order("memory", str(1 + number % 3))
                await served.wait_for(
                    lambda _: not (served.folder / "memory").exists(), patience=PATIENCE, what="memory ran out"
                )
                await asyncio.sleep(1.0)

        account = await disturb(crowd, run_out, at_least=stage.seconds(15))
        left = (served.folder / "memory").exists()
        stage.findings.check("memory ran out each time that it was ordered", not left, f"{TIMES} times")
        if not stage.is_counting:  # it has nothing to split
            deaths = (await served.counters()).total("peregrine_engine_deaths_total")
            stage.findings.check("the engine did not die of it", deaths == 0, deaths)
        check_all_answered(stage, account)
        await check_afterwards(stage, served, crowd, before)
