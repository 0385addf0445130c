"""The server itself is killed (SIGKILL) under load and started again: no process stays behind, and no answer is wrong.

Connections end, which every client notices; nothing that looks whole is not. The next server takes the port at once.
"""

from __future__ import annotations

import asyncio
import time

import psutil

from loadtest.compare.processes import tree_of
from loadtest.operation.disturbance import check_ended_cleanly, disturb, warmed_up
from loadtest.operation.stage import Stage

PATIENCE = 10.0  # seconds for the kernel to end the engine with its server


async def run(stage: Stage) -> None:
    async with stage.serve() as served:
        crowd = stage.crowd(served)
        await warmed_up(stage, served, crowd)
        started: list[float] = []
        killed_at: list[float] = []

        async def kill() -> None:
            family = tree_of(served.pid)
            killed_at.append(time.perf_counter())
            served.kill()
            _, alive = await asyncio.to_thread(psutil.wait_procs, family[1:], PATIENCE)
            left = [process.pid for process in alive]
            stage.findings.check("no process of a killed server is left", not left, left or f"{len(family)} are gone")
            started.append(await served.start_again())
            await asyncio.sleep(2.0)

        account = await disturb(crowd, kill, at_least=stage.seconds(15))
        stage.findings.note(seconds_to_readiness=started[0])
        check_ended_cleanly(stage, account, may_break=True)
        num_after = sum(answer.sent_at > killed_at[0] for answer in account.answers)
        stage.findings.check("requests are answered again after it", num_after > 0, num_after)
        before = await served.holdings()
        num_before = (await served.counters()).num_received
        await crowd.ask_each_once()
        received = (await served.counters()).num_received - num_before
        asked = len(crowd.exchanges)
        stage.findings.check("the new server counts what it is sent", received == asked, f"{received} of {asked}")
        stage.findings.note(memory=before.memory)
