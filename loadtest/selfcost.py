"""What this client itself costs: `python -m loadtest.selfcost` prints processor time per event of a stream.

A server in another process sends events as an engine does: one to each stream, then a pause. The time is all of this
process's, kernel included: waking up, reading the socket, HTTP, SSE, JSON, clocks, and each request's share.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from multiprocessing.connection import Connection

from loadtest.client.client import Client, Target, run_in_loop
from loadtest.client.outcome import Answer
from loadtest.workload.prompts import Exchange

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"model","choices":'
    b'[{"index":0,"text":" token","logprobs":null,"finish_reason":%s}],"usage":null}\n\n'
)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def _serve(port: Connection, num_events: int, interval: float) -> None:
    """A server that answers any request with so many events, one per interval. Runs in a process of its own."""
    step = asyncio.Condition()
    token = _chunk(_EVENT % b"null")
    end = _chunk(_EVENT % b'"length"') + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(_HEAD)
        for _ in range(num_events - 1):
            writer.write(token)
            async with step:
                await step.wait()
        writer.write(end)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port.send(server.sockets[0].getsockname()[1])
    while True:
        await asyncio.sleep(interval)
        async with step:
            step.notify_all()


def _server_process(port: Connection, num_events: int, interval: float) -> None:
    run_in_loop(_serve(port, num_events, interval))


async def _cost(port: int, num_streams: int, num_events: int) -> float:
    """Seconds of processor time per event."""
    exchange = Exchange([1, 2, 3, 4], num_events)
    async with Client(Target(f"http://127.0.0.1:{port}", model="model")) as client:
        await client.send(exchange)
        before, events_before = time.process_time(), client.num_events
        outcomes = await asyncio.gather(*(client.send(exchange) for _ in range(num_streams)))
        assert all(isinstance(outcome, Answer) for outcome in outcomes), outcomes
        return (time.process_time() - before) / (client.num_events - events_before)


def measure_cost(num_streams: int, num_events: int, interval: float) -> float:
    """Seconds of this process's time per event, with `num_streams` that all get one event every `interval` seconds."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=_server_process, args=(theirs, num_events, interval), daemon=True
    )
    server.start()
    try:
        return run_in_loop(_cost(ours.recv(), num_streams, num_events))
    finally:
        server.terminate()
        server.join()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.selfcost", description=__doc__)
    parser.add_argument("--events", type=int, default=300, help="events of each stream (300)")
    parser.add_argument("--interval", type=float, default=0.02, help="seconds per step (0.02)")
    options = parser.parse_args()
    for num_streams in (1, 4, 16, 32, 64):
        cost = measure_cost(num_streams, options.events, options.interval)
        print(f"{num_streams:3d} streams, {1000 * options.interval:g} ms per step: {1e6 * cost:5.1f} us per event")


if __name__ == "__main__":
    main()
