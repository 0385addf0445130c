"""An engine that takes steps and computes nothing, under load: it is replaced, and every request goes on where it was.

No step hangs and the process gives signs of life; only that nothing advances while requests run tells it.
"""

from __future__ import annotations

from loadtest.operation.disturbance import check_afterwards, check_all_answered, disturb, warmed_up
from loadtest.operation.stage import Stage

STEP_TIMEOUT = 3.0  # seconds; 120 by default
PATIENCE = 90.0  # seconds


async def run(stage: Stage) -> None:
    async with stage.serve(f"supervision.step_timeout={STEP_TIMEOUT:g}", obeys_orders=True) as served:
        crowd = stage.crowd(served)
        before = await warmed_up(stage, served, crowd)

        async def circle() -> None:
            served.order("circle")
            await served.wait_for(
                lambda seen: seen.total("peregrine_engine_restarts_total") == 1,
                patience=PATIENCE,
                what="the engine that goes in circles was replaced",
            )

        account = await disturb(crowd, circle, at_least=stage.seconds(15))
        restarts = await served.num_restarts()
        stage.findings.check("the engine was replaced once", restarts == 1, restarts)
        check_all_answered(stage, account)
        await check_afterwards(stage, served, crowd, before)
