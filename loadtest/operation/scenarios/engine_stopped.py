"""The engine's process is stopped (SIGSTOP) under load: it is noticed, replaced, and clients see a pause."""

from __future__ import annotations

import signal

import psutil

from loadtest.operation.disturbance import check_afterwards, check_all_answered, disturb, warmed_up
from loadtest.operation.stage import Stage

PATIENCE = 90.0  # seconds


async def run(stage: Stage) -> None:
    async with stage.serve() as served:
        crowd = stage.crowd(served)
        before = await warmed_up(stage, served, crowd)
        stopped: list[int] = []

        async def stop() -> None:
            stopped.append(served.signal_engine(signal.SIGSTOP))
            await served.wait_for(
                lambda seen: seen.total("peregrine_engine_restarts_total") == 1,
                patience=PATIENCE,
                what="the engine that was stopped was replaced",
            )

        account = await disturb(crowd, stop, at_least=stage.seconds(15))
        is_there = [pid for pid in stopped if psutil.pid_exists(pid)]
        stage.findings.check("the stopped process is gone", not is_there, is_there or "gone")
        check_all_answered(stage, account)
        await check_afterwards(stage, served, crowd, before)
