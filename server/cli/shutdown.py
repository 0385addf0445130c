"""The end of a server: the signals that ask for it, and the drain that loses no request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field

from server.http.key_file import KeyFile
from server.state import ServerState
from server.telemetry.console import Console


@dataclass(frozen=True, slots=True)
class Ending:
    """What signals have asked for."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    is_urgent: asyncio.Event = field(default_factory=asyncio.Event)  # a person waits for it


def catch_signals(console: Console, key_file: KeyFile | None) -> Ending:
    """Makes SIGTERM and SIGINT ask for the end; a SIGINT after that ends the process, and so the engine's.

    SIGHUP reads the key file again. Without one it asks for the end: its terminal has gone.
    """
    ending = Ending()

    def on_interrupt() -> None:
        if ending.asked.is_set():
            console.say("stopped at once")
            os._exit(128 + signal.SIGINT)
        ending.is_urgent.set()
        ending.asked.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ending.asked.set)
    loop.add_signal_handler(signal.SIGHUP, ending.asked.set if key_file is None else key_file.reload)
    loop.add_signal_handler(signal.SIGINT, on_interrupt)
    return ending


async def drain(state: ServerState, tasks: set[asyncio.Task[None]], ending: Ending, console: Console) -> None:
    """Ends readiness, then admission, then waits for the requests that run. Each of the two waits is bounded.

    tasks: one for each request that is being answered. In between, for `server.drain_delay`, requests are served as
    ever: a load balancer learns from /readyz, within its interval of checks, to send them elsewhere.
    """
    state.end_readiness()
    delay = state.config.server.drain_delay
    if delay and state.first_ready.is_set() and state.failure is None and not ending.is_urgent.is_set():
        console.say(f"draining: /readyz says 503, and requests are served for another {delay:g} s")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await first_of(ending.is_urgent.wait(), state.failed.wait())
    state.refuse_requests()
    await _finish_requests(state, tasks, console)


async def _finish_requests(state: ServerState, tasks: set[asyncio.Task[None]], console: Console) -> None:
    """Waits until every request has been answered, but not for longer than it may take."""
    timeout = state.config.server.shutdown_timeout
    if tasks:
        console.say(f"stopping: {len(tasks)} requests have {timeout:g} s to finish; Ctrl+C ends them at once")
    deadline = time.monotonic() + timeout
    failing = asyncio.create_task(state.failed.wait())
    while tasks and not failing.done() and (left := deadline - time.monotonic()) > 0:
        await asyncio.wait({*tasks, failing}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
    failing.cancel()
    if tasks and state.failure is None:
        console.say(f"stopping: {len(tasks)} requests did not finish in {timeout:g} s and are ended")


async def first_of(*waits: Coroutine[None, None, bool] | asyncio.Future[None]) -> None:
    """Waits until one of them is done, and cancels the others."""
    tasks = {asyncio.ensure_future(wait) for wait in waits}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
