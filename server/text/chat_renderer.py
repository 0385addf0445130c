"""Rendering of chat templates in worker processes, which are replaced when a limit has killed them."""

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from server.text.template_worker import GRACE, Render, Rendered, frame, read_frame

logger = logging.getLogger(__name__)

NUM_WORKERS = 2  # so that one conversation that takes all its time does not hold up every other
PATIENCE = 30.0  # seconds beyond the processor time: the machine may be busy with other things
KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "HOME")  # no keys, no tokens


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """Of one rendering: processor seconds, characters of the prompt, bytes of memory beyond the process's own."""

    max_seconds: float = 2.0
    max_characters: int = 1 << 24
    max_bytes: int = 512 << 20


class ChatRenderer:
    """Renders conversations, in order of arrival, a few at once. One serves any number of templates and event loops."""

    def __init__(self, limits: TemplateLimits | None = None) -> None:
        self.limits = limits or TemplateLimits()
        self._threads = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="chat-template")
        self._own = threading.local()  # each thread talks to a process of its own
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._finalizer = weakref.finalize(self, _end, self._processes, self._threads)

    def start(self) -> None:
        """Begins to start the processes, which import for half a second."""
        both_run = threading.Barrier(NUM_WORKERS)
        for _ in range(NUM_WORKERS):
            self._threads.submit(self._start_beside_others, both_run)

    def close(self) -> None:
        self._finalizer()

    async def render(self, request: Render) -> str:
        """Raises ValueError where the template or a limit refuses the conversation."""
        rendered = await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, request)
        if rendered.text is None:
            raise ValueError(f"the model's chat template refused the messages: {rendered.reason}")
        return rendered.text

    def _start_beside_others(self, both_run: threading.Barrier) -> None:
        self._process()
        try:
            both_run.wait(timeout=1.0)  # or else one thread would take every call
        except threading.BrokenBarrierError:
            return

    def _ask(self, request: Render) -> Rendered:
        try:
            data = frame(request)
        except (OverflowError, RecursionError, UnicodeEncodeError) as error:
            return Rendered(None, f"they cannot be given to it: {error}")
        answer = self._try(request, data)
        if answer is None:  # killed from outside, perhaps before it had read anything
            answer = self._try(request, data)
        return answer or Rendered(None, "the process that renders it was killed, twice; look for what kills it")

    def _try(self, request: Render, sent: bytes) -> Rendered | None:
        """Renders in this thread's process; None where that was killed from outside. sent: the request, framed"""
        process = self._process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(sent)
            process.stdin.flush()
            is_over = _wait(process.stdout.fileno(), request.max_seconds + GRACE + PATIENCE)
            data = read_frame(process.stdout) if is_over else None
        except OSError:  # it ended before it had read all
            is_over, data = True, None
        if data is not None:
            return msgspec.msgpack.decode(data, type=Rendered)
        was_killed = is_over and process.wait() == -signal.SIGKILL
        self._kill(process)
        if was_killed:
            return None
        logger.warning("a process that renders chat templates was ended by a limit; another one takes its place")
        return Rendered(None, f"it took more than {request.max_seconds:g} s of processor time, or too much memory")

    def _process(self) -> subprocess.Popen[bytes]:
        """The worker process of the calling thread: a new one where there is none, or it was killed while idle."""
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        if process is not None and process.poll() is None:
            return process
        if process is not None:
            self._kill(process)
        root = str(Path(__file__).parents[2])
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        environment["TRANSFORMERS_VERBOSITY"] = "error"
        process = subprocess.Popen(
            [sys.executable, "-m", "server.text.template_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a terminal interrupts the server, which ends it in its time
        )
        self._own.process = process
        self._processes.add(process)
        return process

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        self._processes.discard(process)
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


def _end(processes: set[subprocess.Popen[bytes]], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for process in list(processes):
        _stop(process)
