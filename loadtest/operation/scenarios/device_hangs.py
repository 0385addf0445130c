"""A device that never answers, under load: the watchdog replaces the engine, and every request goes on where it was.

The step never ends while the process gives signs of life. It happens twice, with traffic between.
"""

from __future__ import annotations

import asyncio

from loadtest.operation.disturbance import check_afterwards, check_all_answered, disturb, warmed_up
from loadtest.operation.stage import Stage

STEP_TIMEOUT = 5.0  # seconds; 120 by default
TIMES = 2
PATIENCE = 90.0  # seconds


async def run(stage: Stage) -> None:
    settings = (f"supervision.step_timeout={STEP_TIMEOUT:g}", "supervision.max_deaths=20")
    async with stage.serve(*settings, obeys_orders=True) as served:
        crowd = stage.crowd(served)
        before = await warmed_up(stage, served, crowd)

        async def hang() -> None:
            for number in range(1, TIMES + 1):
                served.order("hang")
                await served.wait_for(
                    lambda seen, number=number: seen.total("peregrine_engine_restarts_total") == number,  # type: ignore[misc]
                    patience=PATIENCE,
                    what="the engine that hangs was replaced",
                )
                await asyncio.sleep(2.0)

        account = await disturb(crowd, hang, at_least=stage.seconds(20))
        restarts = await served.num_restarts()
        stage.findings.check("the engine was replaced each time it hung", restarts == TIMES, restarts)
        longest = max((max(answer.gaps, default=0.0) for answer in account.answers), default=0.0)
        stage.findings.note(step_timeout=STEP_TIMEOUT, num_restarts=restarts, longest_pause_seconds=longest)
        check_all_answered(stage, account)
        await check_afterwards(stage, served, crowd, before)
