"""Whether a server has let go of everything that requests had of it."""

from __future__ import annotations

import asyncio
import time

from loadtest.operation.findings import Findings
from loadtest.operation.served import Holdings, ServedModel

IDLE_PATIENCE = 30.0  # seconds from the last request to its last trace
SETTLE_PATIENCE = 10.0  # seconds for connections and threads to go
SPARE_DESCRIPTORS = 4  # of this reader's own connection, and of a pool that may keep one more
SPARE_TASKS = 2
SPARE_THREADS = 8  # of pools that grow to their size once
MEMORY_GROWTH = 0.10  # of what a warmed-up server held
MEMORY_SPARE = 48 << 20  # bytes: allocators keep pages


async def check_nothing_leaked(served: ServedModel, before: Holdings, findings: Findings) -> None:
    """Waits until the server is idle, and compares with `before`, which was read of the same server, warmed up."""
    counters = await served.wait_for(lambda seen: seen.is_idle, patience=IDLE_PATIENCE, what="the server became idle")
    owned = counters.total("peregrine_kv_blocks", state="owned")
    findings.check("no KV block is owned, nothing runs or waits, and all that came has ended", owned == 0, "as it says")
    deadline = time.monotonic() + SETTLE_PATIENCE
    after = await served.holdings()
    while _leaks(before, after) and time.monotonic() < deadline:
        await asyncio.sleep(0.25)
        after = await served.holdings()
    leaks = _leaks(before, after)
    findings.check(
        "descriptors, processes, threads, tasks and memory are what they were before",
        not leaks,
        "; ".join(leaks) or f"{after.memory >> 20} MiB, before {before.memory >> 20}",
    )
    findings.note(
        descriptors_before=before.descriptors, descriptors_after=after.descriptors,
        engine_descriptors_before=before.engine_descriptors, engine_descriptors_after=after.engine_descriptors,
        processes_after=after.processes, threads_before=before.threads, threads_after=after.threads,
        tasks_before=before.tasks, tasks_after=after.tasks,
        memory_before=before.memory, memory_after=after.memory,
        server_memory_before=before.server_memory, server_memory_after=after.server_memory,
    )  # fmt: skip


def _leaks(before: Holdings, after: Holdings) -> list[str]:
    limits = {
        "descriptors": before.descriptors + SPARE_DESCRIPTORS,
        "engine_descriptors": before.engine_descriptors + SPARE_DESCRIPTORS,
        "processes": before.processes,
        "threads": before.threads + SPARE_THREADS,
        "tasks": before.tasks + SPARE_TASKS,
        "memory": before.memory * (1 + MEMORY_GROWTH) + MEMORY_SPARE,
        "server_memory": before.server_memory * (1 + MEMORY_GROWTH) + MEMORY_SPARE,
    }
    found = {name: (getattr(before, name), getattr(after, name)) for name in limits}
    return [f"{name}: {now}, before {was}" for name, (was, now) in found.items() if now > limits[name]]
