"""What else the machine does: for measurements on the machine that serves."""

from __future__ import annotations

import asyncio
import time

import psutil


async def busy_cores(window: float) -> float:
    """Cores in use over the next `window` seconds, by all processes together.

    Between runs the servers count as well: one that spins while it has nothing to do takes from the others.
    """
    psutil.cpu_percent()  # the next call counts from here
    await asyncio.sleep(window)
    return psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)


async def wait_until_quiet(limit: float, *, patience: float, window: float) -> float:
    """Returns when fewer than `limit` cores are in use, or after `patience` seconds; the last value seen."""
    deadline = time.perf_counter() + patience
    while (busy := await busy_cores(window)) >= limit and time.perf_counter() < deadline:
        pass
    return busy
