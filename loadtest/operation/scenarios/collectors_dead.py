"""Collectors of metrics and traces that are slow or dead, under load: no request waits for them, and nothing piles up.

A collector of spans takes connections and never answers. Scrapers of `/metrics` ask, read nothing and stay. Answers
come as fast as without them, by half at least.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from loadtest.client.client import Target
from loadtest.operation.disturbance import check_afterwards, check_all_answered, disturb, warmed_up
from loadtest.operation.load import percentile_of
from loadtest.operation.raw import RawConnection
from loadtest.operation.stage import Stage

NUM_SCRAPERS = 32
SCRAPES = 4  # of each, one behind the other on a connection
FACTOR = 2.0


async def run(stage: Stage) -> None:
    async with _silent_collector() as endpoint, stage.serve(f"tracing.endpoint={endpoint}") as served:
        crowd = stage.crowd(served)
        before = await warmed_up(stage, served, crowd)
        calm = [answer.end_to_end for answer in crowd.account.answers]
        num_calm = len(calm)

        async def scrape() -> None:
            scrapers = [await _scrape(stage.target(served)) for _ in range(NUM_SCRAPERS)]
            await asyncio.sleep(stage.seconds(20))
            for scraper in scrapers:
                scraper.reset()

        account = await disturb(crowd, scrape, at_least=stage.seconds(20))
        usual, now = percentile_of(calm, 50), percentile_of([a.end_to_end for a in account.answers[num_calm:]], 50)
        stage.findings.check(
            f"an answer takes at most {FACTOR:g} times as long as without scrapers (medians)",
            now <= FACTOR * usual,
            f"{now:.3f} s, {usual:.3f} s",
        )
        check_all_answered(stage, account)
        await check_afterwards(stage, served, crowd, before)


@asynccontextmanager
async def _silent_collector() -> AsyncIterator[str]:
    """Takes connections, and never answers; yields its address."""
    writers: list[asyncio.StreamWriter] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while await reader.read(65536):
            pass

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


async def _scrape(target: Target) -> RawConnection:
    connection = await RawConnection.open(target)
    request = f"GET /metrics HTTP/1.1\r\nHost: {urlsplit(target.base_url).netloc}\r\n\r\n"
    await connection.send(request.encode() * SCRAPES)
    return connection
