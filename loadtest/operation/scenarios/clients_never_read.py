"""Clients that ask for long streams and read nothing of them: they are left, and nobody else notices.

Their connections have buffers that are full after a few events. The server drops each when it has taken nothing for
`operation.send_timeout`, and keeps numbers for it until then, not text.
"""

from __future__ import annotations

import asyncio

from loadtest.operation.disturbance import check_afterwards_beside, check_all_answered, disturb, warmed_up
from loadtest.operation.raw import RawConnection, request_bytes
from loadtest.operation.stage import Stage
from loadtest.workload.prompts import Exchange

NUM_CLIENTS = 24
NUM_TOKENS = 1500
SEND_TIMEOUT = 3.0  # seconds; 300 by default
PATIENCE = 240.0  # seconds


async def run(stage: Stage) -> None:
    async with stage.serve(f"operation.send_timeout={SEND_TIMEOUT:g}") as served:
        crowd = stage.crowd(served)
        before = await warmed_up(stage, served, crowd)
        target = stage.target(served)
        left: list[bool] = []

        async def read_nothing() -> None:
            exchanges = stage.exchanges(NUM_CLIENTS, num_words=8)
            num_logprobs = None if stage.is_counting else 20  # so that buffers are full soon
            connections = [await RawConnection.open(target) for _ in exchanges]
            for connection, exchange in zip(connections, exchanges, strict=True):
                asked = Exchange(exchange.prompt, NUM_TOKENS)
                await connection.send(request_bytes(target, asked, stream=True, num_logprobs=num_logprobs))
            await asyncio.sleep(2.0)
            await served.wait_for(
                lambda seen: seen.num_received >= crowd.num_learned + NUM_CLIENTS and _is_done(seen.by_status()),
                patience=PATIENCE,
                what="the clients that read nothing were left",
            )
            left.extend(await asyncio.gather(*(connection.ends(patience=10.0) for connection in connections)))
            for connection in connections:
                connection.close()

        def _is_done(statuses: dict[str, int]) -> bool:
            return sum(number for status, number in statuses.items() if status != "200") >= NUM_CLIENTS

        account = await disturb(crowd, read_nothing, at_least=stage.seconds(15))
        stage.findings.check(
            "the server ends every connection that takes nothing", all(left), f"{sum(left)} of {len(left)}"
        )
        check_all_answered(stage, account)
        await check_afterwards_beside(stage, served, crowd, before, num_others=NUM_CLIENTS)
