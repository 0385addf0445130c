"""Processes of a rollout: replicas and balancers, each with its output in a file, ended with all that they started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

POLL = 0.05  # seconds


class RolloutProcess:
    """A command in a session of its own. `url`: where it says 200 when it can be used."""

    def __init__(
        self, name: str, command: Sequence[str], *, url: str, log: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.url = url
        self._log = log
        with log.open("a") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_until_ready(self, client: httpx.AsyncClient, *, patience: float) -> float:
        """Seconds until its url says 200. Raises RuntimeError, with what it printed last, where it does not."""
        began = time.monotonic()
        while True:
            try:
                if (await client.get(self.url)).status_code == 200:
                    return time.monotonic() - began
            except httpx.TransportError:
                pass  # not up yet
            code = self._process.poll()
            if code is not None or time.monotonic() - began > patience:
                state = f"ended with code {code}" if code is not None else f"was not ready within {patience:g} s"
                raise RuntimeError(f"{self.name} {state}; it printed last:\n{self.last_words()}")
            await asyncio.sleep(POLL)

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    async def wait(self, *, patience: float) -> int:
        """Its exit code. Raises RuntimeError if it runs on for `patience` seconds."""
        try:
            return await asyncio.to_thread(self._process.wait, patience)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{self.name} did not end within {patience:g} s") from error

    def kill(self) -> None:
        """Ends its whole session at once; does nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def last_words(self) -> str:
        return self._log.read_text(errors="replace")[-2000:].strip() or "nothing"
