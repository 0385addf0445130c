"""The server runs out of file descriptors under load, and its engine dies meanwhile: those inside lose nothing.

Its limit is lowered to what it has open and a few more, and idle connections take those. Then the engine is killed,
for whose process descriptors are held back. New connections may fail for as long as that lasts; no answer is wrong, and
when the limit is back everything is as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal

import psutil

from loadtest.operation.disturbance import check_afterwards_beside, check_ended_cleanly, disturb, warmed_up
from loadtest.operation.raw import RawConnection
from loadtest.operation.stage import Stage

SPARE = 6  # descriptors beyond those that are open
NUM_IDLE = 200  # connections that ask for nothing
PATIENCE = 120.0  # seconds


async def run(stage: Stage) -> None:
    async with stage.serve("supervision.max_deaths=20") as served:
        crowd = stage.crowd(served)
        before = await warmed_up(stage, served, crowd)

        async def run_out() -> None:
            server = psutil.Process(served.pid)
            _, hard = server.rlimit(resource.RLIMIT_NOFILE)
            soft = server.rlimit(resource.RLIMIT_NOFILE)[0]
            server.rlimit(resource.RLIMIT_NOFILE, (server.num_fds() + SPARE, hard))
            idle: list[RawConnection] = []
            with contextlib.suppress(OSError):
                idle += [await RawConnection.open(stage.target(served)) for _ in range(NUM_IDLE)]
            served.signal_engine(signal.SIGKILL)
            await asyncio.sleep(6.0)
            is_back = served.engine_pid is not None
            stage.findings.check("the engine is started again without a free descriptor", is_back, served.engine_pid)
            server.rlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for connection in idle:
                connection.close()
            await served.wait_for(
                lambda seen: seen.total("peregrine_engine_ready") == 1, patience=PATIENCE, what="the engine is ready"
            )

        account = await disturb(crowd, run_out, at_least=stage.seconds(20))
        check_ended_cleanly(stage, account, may_break=True)
        await check_afterwards_beside(stage, served, crowd, before, num_others=0, may_miss=True)
