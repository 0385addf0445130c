"""A server of ours as a process of this machine: what it counts, what it holds, and its engine's process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from loadtest.compare.processes import memory_of, tree_of
from loadtest.operation.counters import Counters
from loadtest.rollout.processes import RolloutProcess

START_PATIENCE = 240.0  # seconds: the first start compiles
POLL = 0.1  # seconds
ENGINE = "engine.process"  # in the command of an engine's process


@dataclass(frozen=True)
class Holdings:
    """What a server has of the machine. memory: bytes that its processes together hold; server_memory: of the one that
    speaks HTTP alone, resident. tasks: of its event loop"""

    memory: int
    server_memory: int
    descriptors: int
    engine_descriptors: int
    processes: int
    threads: int
    tasks: int


class ServedModel:
    """A running server. `folder` holds its log, and the orders of faults."""

    def __init__(
        self, command: Sequence[str], *, port: int, folder: Path, environment: Mapping[str, str], api_key: str | None
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder
        self._command, self._environment = [*command, "--port", str(port)], environment
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30.0)
        self._process = self._start()

    def _start(self) -> RolloutProcess:
        return RolloutProcess(
            "the server",
            self._command,
            url=f"{self.url}/readyz",
            log=self.folder / "server.log",
            environment=self._environment,
        )

    async def wait_until_ready(self) -> float:
        """Seconds until it was. Raises RuntimeError, with what it printed last, where it is not."""
        return await self._process.wait_until_ready(self._http, patience=START_PATIENCE)

    async def start_again(self) -> float:
        """The same command at the same port, after its end; seconds until it is ready."""
        await self._process.wait(patience=30.0)
        self._process = self._start()
        return await self.wait_until_ready()

    async def close(self) -> None:
        """Ends it as an operator does, and at once where that takes long, or is cancelled."""
        try:
            await self._http.aclose()
            self._process.send(signal.SIGTERM)
            with contextlib.suppress(RuntimeError):
                await self._process.wait(patience=30.0)
        finally:
            self._process.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def engine_pid(self) -> int | None:
        """None while there is no such process."""
        return next((process.pid for process in tree_of(self.pid)[1:] if ENGINE in _command_line(process)), None)

    def order(self, fault: str, text: str = "") -> None:
        """Orders a fault, from servers that obey such orders (`tests.support.fault_orders`)."""
        partial = self.folder / f".{fault}"
        partial.write_text(text)
        partial.rename(self.folder / fault)

    def signal_engine(self, number: int) -> int:
        """Sends a signal to the engine's process. Raises RuntimeError where there is none."""
        pid = self.engine_pid
        if pid is None:
            raise RuntimeError("there is no engine process to send a signal to")
        os.kill(pid, number)
        return pid

    async def replace_engine(self, number: int, *, patience: float, what: str) -> None:
        """Kills the engine, and waits until another is ready, by the `number`-th restart. Errors as of `wait_for`."""
        self.signal_engine(signal.SIGKILL)
        await self.wait_for(
            lambda seen: (
                seen.total("peregrine_engine_restarts_total") == number and seen.total("peregrine_engine_ready") == 1
            ),
            patience=patience,
            what=what,
        )

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    async def counters(self) -> Counters:
        """Raises httpx.TransportError while it cannot be reached."""
        response = await self._http.get("/metrics")
        response.raise_for_status()
        return Counters.parse(response.text)

    async def get(self, path: str) -> httpx.Response:
        return await self._http.get(path)

    async def wait_for(self, condition: Callable[[Counters], bool], *, patience: float, what: str) -> Counters:
        """The metrics when they first fulfilled it. Raises RuntimeError where they do not within `patience` seconds."""
        deadline = time.monotonic() + patience
        counters: Counters | None = None
        while time.monotonic() < deadline:
            try:
                counters = await self.counters()
                if condition(counters):
                    return counters
            except (httpx.TransportError, httpx.HTTPStatusError):
                pass  # it starts, or has no descriptors left
            await asyncio.sleep(POLL)
        seen = "it did not answer" if counters is None else f"statuses {dict(counters.by_status())}"
        raise RuntimeError(f"{what}: not within {patience:g} s; {seen}; it printed last:\n{self._process.last_words()}")

    async def num_restarts(self) -> int:
        return int((await self.counters()).total("peregrine_engine_restarts_total"))

    async def holdings(self) -> Holdings:
        tasks = (await self.counters()).total("peregrine_server_tasks")
        memory = await asyncio.to_thread(memory_of, self.pid)
        processes, engine = tree_of(self.pid), self.engine_pid
        server = processes[0]
        return Holdings(
            memory=0 if memory is None else memory.held,
            server_memory=server.memory_info().rss,
            descriptors=server.num_fds(),
            engine_descriptors=0 if engine is None else psutil.Process(engine).num_fds(),
            processes=len(processes),
            threads=server.num_threads(),
            tasks=int(tasks),
        )


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
