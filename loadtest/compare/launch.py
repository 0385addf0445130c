"""Starting a server by a shell command, waiting for its first answer, and ending it with all that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import replace
from urllib.parse import urlsplit

import psutil

from loadtest.client.client import Client, Target
from loadtest.client.discovery import first_model
from loadtest.client.outcome import Answer
from loadtest.compare.processes import resume, send, tree_of
from loadtest.workload.prompts import Exchange

POLL = 0.05  # seconds between two attempts to get an answer: how exact a start time is
STOP_PATIENCE = 15.0  # seconds between asking a server to end and ending it
_TAIL_BYTES = 2000
_KEY = re.compile(r"""((?:--api[-_]keys?[ =]|(?:api|operator)_keys?[=:]|(?:API|OPERATOR)_KEYS?=)\s*["']?)[^\s"']+""")


class LaunchedServer:
    """A running command, in a session of its own, so that what is typed at the terminal does not reach it.

    `pid` is the shell's. What the command prints is kept, to be shown if it fails.
    """

    def __init__(self, name: str, command: str) -> None:
        self.name = name
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop
        self.started_at = time.perf_counter()
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_until_ready(self, target: Target, probe: Exchange, *, patience: float) -> float:
        """Seconds from the start of the command to the end of the first whole answer.

        Raises RuntimeError, with what the server printed last, if it ends or gives none within `patience` seconds.
        """
        try:
            async with asyncio.timeout(patience):
                while not await _answers(target, probe):
                    self._check_alive()
                    await asyncio.sleep(POLL)
        except TimeoutError as error:
            raise RuntimeError(f"{self.name} gave no answer within {patience:g} s; {self._last_words()}") from error
        seconds = time.perf_counter() - self.started_at
        self._check_alive()
        return seconds

    async def stop(self) -> None:
        """Ends the server and everything that it started, paused or not."""
        resume(self.pid)
        processes = tree_of(self.pid)
        send(processes, signal.SIGTERM)
        _, alive = await asyncio.to_thread(psutil.wait_procs, processes, STOP_PATIENCE)
        send(alive, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # those that left the tree when their parent ended
            os.killpg(self.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)
        self._output.close()

    def _check_alive(self) -> None:
        status = self._process.poll()
        if status is not None:
            raise RuntimeError(f"{self.name} ended with status {status}; {self._last_words()}")

    def _last_words(self) -> str:
        size = os.fstat(self._output.fileno()).st_size
        tail = os.pread(self._output.fileno(), _TAIL_BYTES, max(size - _TAIL_BYTES, 0)).decode(errors="replace")
        return f"it printed last:\n{tail.strip()}" if tail.strip() else "it printed nothing"


def without_keys(command: str) -> str:
    """A server's command as it may be kept in a file: API keys are left out."""
    return _KEY.sub(r"\1...", command)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at now."""
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


async def check_nobody_answers(url: str) -> None:
    """Raises ValueError if a server listens there already: its answers would be taken for those of the one to start."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        _, writer = await asyncio.open_connection(parts.hostname, port)
    except OSError:
        return
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    raise ValueError(f"something listens at {url} already; end it, or give the server to be started another port")


async def _answers(target: Target, probe: Exchange) -> bool:
    if target.model is None:
        try:
            target = replace(target, model=await first_model(target))
        except ValueError:  # not up yet
            return False
    async with Client(target) as client:
        return isinstance(await client.send(probe), Answer)
