"""A thousand clients that vanish, at every moment of a request: what they asked for is dropped, and nothing stays.

Some leave before their request is whole, some when it is, some in the middle of the answer; some with an RST, as a
machine that loses its power, and some with a FIN.
"""

from __future__ import annotations

import asyncio
import random

from loadtest.client.client import Target
from loadtest.operation.disturbance import check_afterwards_beside, check_all_answered, disturb, warmed_up
from loadtest.operation.raw import RawConnection, request_bytes
from loadtest.operation.stage import Stage
from loadtest.workload.prompts import Exchange

SECONDS, NUM_PER_SECOND = 20.0, 50  # a thousand
AT_ONCE = 50
NUM_TOKENS = 200


async def run(stage: Stage) -> None:
    async with stage.serve() as served:
        crowd = stage.crowd(served)
        before = await warmed_up(stage, served, crowd)
        target, chance = stage.target(served), random.Random(stage.options.seed)
        exchanges = [Exchange(one.prompt, NUM_TOKENS) for one in stage.exchanges(64, num_words=12)]
        counted: list[bool] = []
        seconds = stage.seconds(SECONDS)
        num_clients = round(NUM_PER_SECOND * seconds)

        async def vanish() -> None:
            for first in range(0, num_clients, AT_ONCE):
                numbers = range(first, min(first + AT_ONCE, num_clients))
                counted.extend(
                    await asyncio.gather(*(_vanish(target, exchanges[n % 64], n % 8, chance) for n in numbers))
                )

        account = await disturb(crowd, vanish, at_least=seconds)
        check_all_answered(stage, account)
        stage.findings.note(num_vanished=len(counted), num_whole_requests=sum(counted))
        await check_afterwards_beside(stage, served, crowd, before, num_others=sum(counted), may_miss=True)


async def _vanish(target: Target, exchange: Exchange, way: int, chance: random.Random) -> bool:
    """Whether the whole request was sent, so that the server may count it."""
    request = request_bytes(target, exchange, stream=way != 6)
    connection = await RawConnection.open(target)
    parts = {0: 0, 1: 40, 2: len(request) - 20}  # nothing, half of a head, most of a body
    await connection.send(request[: parts.get(way, len(request))])
    if way == 4:
        await connection.read_some(patience=30.0)
    elif way in (5, 6, 7):
        await asyncio.sleep(chance.random())
    if way in (3, 5):
        connection.close()
    else:
        connection.reset()
    return way >= 2
