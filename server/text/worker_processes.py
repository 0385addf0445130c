"""Processes for work that a client's input may make endless: each answers a frame with a frame, and may be killed.

A limit of processor time or memory that such a process sets itself ends it, if all else fails, and nothing is lost with
it: another one takes its place.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server.text.worker_limits import GRACE, read_frame

logger = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds beyond the processor time: the machine may be busy with other things
KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "HOME")  # no keys, no tokens


class WorkerEndedError(Exception):
    """The process that worked on it has ended. was_limit: a limit of its own, or the time, has ended it."""

    def __init__(self, *, was_limit: bool) -> None:
        super().__init__("the process ended")
        self.was_limit = was_limit


class WorkerProcesses:
    """Runs `python -m module` in a few processes, each of which a thread of its own talks to.

    greeting: makes frames that each process is sent first, in the thread; it answers none of them
    """

    def __init__(self, module: str, number: int, *, name: str, greeting: Callable[[], bytes] = bytes) -> None:
        self._module, self._number, self._greeting, self._name = module, number, greeting, name
        self._threads = ThreadPoolExecutor(number, thread_name_prefix=name)
        self._own = threading.local()  # each thread talks to a process of its own
        self.processes: set[subprocess.Popen[bytes]] = set()
        self._starting = threading.Lock()  # held while a process is started: none may be after the end
        self._closed = threading.Event()
        self._finalizer = weakref.finalize(
            self, _end, self.processes, self._threads, starting=self._starting, closed=self._closed
        )

    def start(self) -> None:
        """Begins to start the processes, which import for a while; else each starts when it is first needed."""
        all_run = threading.Barrier(self._number)
        for _ in range(self._number):
            self._threads.submit(self._start_beside_others, all_run)

    def close(self) -> None:
        self._finalizer()

    async def ask(self, encode: Callable[[], bytes], max_seconds: float) -> bytes:
        """The answer to a frame, in order of arrival, a few at once. Raises WorkerEndedError, and what `encode` raises.

        encode: makes the frame, in the thread; max_seconds: of processor time that the process allows itself
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, encode, max_seconds)

    def _start_beside_others(self, all_run: threading.Barrier) -> None:
        self._process()
        try:
            all_run.wait(timeout=1.0)  # or else one thread would take every call
        except threading.BrokenBarrierError:
            return

    def _ask(self, encode: Callable[[], bytes], max_seconds: float) -> bytes:
        sent = encode()
        try:
            return self._try(sent, max_seconds)
        except WorkerEndedError as ended:
            if ended.was_limit:
                raise
        return self._try(sent, max_seconds)  # killed from outside, perhaps before it had read anything

    def _try(self, sent: bytes, max_seconds: float) -> bytes:
        """Asks this thread's process."""
        process = self._process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(sent)
            process.stdin.flush()
            is_over = _wait(process.stdout.fileno(), max_seconds + GRACE + PATIENCE)
            data = read_frame(process.stdout) if is_over else None
        except OSError:  # it ended before it had read all
            is_over, data = True, None
        if data is not None:
            return data
        was_killed = is_over and process.wait() == -signal.SIGKILL
        self._kill(process)
        if not was_killed:
            logger.warning("a process (%s) was ended by a limit; another one takes its place", self._name)
        raise WorkerEndedError(was_limit=not was_killed)

    def _process(self) -> subprocess.Popen[bytes]:
        """The worker process of the calling thread: a new one where there is none, or it was killed while idle.

        Raises WorkerEndedError behind the end of all of them: what was in work then must not begin anew.
        """
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        if process is not None and process.poll() is None:
            return process
        if process is not None:
            self._kill(process)
        root = str(Path(__file__).parents[2])
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        environment["TRANSFORMERS_VERBOSITY"] = "error"
        with self._starting:
            if self._closed.is_set():
                raise WorkerEndedError(was_limit=False)
            process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # a terminal interrupts the server, which ends it in its time
            )
            self.processes.add(process)
        self._own.process = process
        assert process.stdin is not None
        process.stdin.write(self._greeting())
        return process

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        self.processes.discard(process)
        _stop(process)
        self._own.process = None


def _wait(file: int, seconds: float) -> bool:
    """Waits until the file can be read or is at its end. Unlike `select`, poll takes descriptors above 1023."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # what was still to be written has nobody to read it
                continue


def _end(
    processes: set[subprocess.Popen[bytes]],
    threads: ThreadPoolExecutor,
    *,
    starting: threading.Lock,
    closed: threading.Event,
) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    with starting:
        closed.set()
    for process in list(processes):
        _stop(process)
