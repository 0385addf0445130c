"""The wall clock jumps by hours, forth and back, under load: nothing waits, expires or ends because of it.

The clock that Python programs read jumps in both processes of the server, not that of the machine, which others use.
"""

from __future__ import annotations

import asyncio

from loadtest.operation.disturbance import check_afterwards, check_all_answered, disturb, warmed_up
from loadtest.operation.stage import Stage

JUMPS = (3600.0, -7200.0, 86400.0, 0.0)  # seconds, from the true time


async def run(stage: Stage) -> None:
    if stage.is_counting:
        raise ValueError("the counting engine's server has no clock to turn; use --engine default")
    async with stage.serve("limits.max_queue_seconds=60", obeys_orders=True) as served:
        crowd = stage.crowd(served)
        before = await warmed_up(stage, served, crowd)

        async def jump() -> None:
            for jump in JUMPS:
                served.order("clock", str(jump))
                await asyncio.sleep(3.0)

        account = await disturb(crowd, jump, at_least=stage.seconds(15))
        longest = max((answer.end_to_end for answer in account.answers), default=0.0)
        stage.findings.note(longest_answer_seconds=longest)
        deaths = (await served.counters()).total("peregrine_engine_deaths_total")
        stage.findings.check("the engine was not held to be hung", deaths == 0, deaths)
        check_all_answered(stage, account)
        await check_afterwards(stage, served, crowd, before)
