"""Processes of this machine: what one and its descendants hold, pausing them, and what all others do meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Memory:
    """Bytes in memory. held: each page once, also where processes outside of the tree have it too (two servers of the
    same libraries, for one): what the tree would hold alone. resident: shared pages once for each process (RSS)"""

    held: int
    resident: int


def tree_of(pid: int) -> list[psutil.Process]:
    """A process and its descendants, parents before their children; empty if the process has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(pid: int) -> Memory | None:
    """The memory of a process and its descendants. None if the process has ended or may not be read."""
    files: dict[tuple[str, str], int] = {}
    num_own = num_resident = 0
    try:
        for process in tree_of(pid):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we looked
                num_resident += process.memory_info().rss
                own, mapped = _mappings(process)
                num_own += own
                for key, size in mapped.items():  # the same file in two processes is the same pages
                    files[key] = max(files.get(key, 0), size)
    except psutil.AccessDenied:
        return None
    return Memory(num_own + sum(files.values()), num_resident) if num_resident else None


def _mappings(process: psutil.Process) -> tuple[int, Counter[tuple[str, str]]]:
    """Bytes of the process's own pages, and of unchanged pages of files by path and permissions.

    Pages that a fork shares are divided among those that have them. Without Linux's /proc all pages are its own.
    """
    mapped: Counter[tuple[str, str]] = Counter()
    if not psutil.LINUX:
        return process.memory_info().rss, mapped
    num_own = 0
    for mapping in process.memory_maps(grouped=False):
        if mapping.path.startswith("["):  # [heap], [stack], [anon]
            num_own += mapping.pss
        else:
            num_own += mapping.private_dirty
            mapped[mapping.path, mapping.perms] += mapping.rss - mapping.private_dirty
    return num_own, mapped


def pause(pid: int) -> None:
    """Stops the whole tree where it is (SIGSTOP). A paused process keeps its memory and its connections.

    Parents stop before their children, so that no parent sees a child that does not answer.
    """
    send(tree_of(pid), signal.SIGSTOP)


def resume(pid: int) -> None:
    """Lets a paused tree go on, children before their parents."""
    send(tree_of(pid)[::-1], signal.SIGCONT)


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Sends a signal to each process that still runs, in order."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


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
