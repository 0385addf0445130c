"""Where the servers of a comparison come from, and what becomes of them between their turns."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loadtest.compare.launch import LaunchedServer, check_nobody_answers, without_keys
from loadtest.compare.measure import Peer, ReadyPeer, prepare
from loadtest.report.session import Server
from loadtest.workload.prompts import Exchange


class RunningHost:
    """A server of a comparison that is already running, and is not ended by it."""

    def __init__(self, peer: Peer, *, seed: int) -> None:
        self.peer = peer
        self._seed = seed
        self._ready: ReadyPeer | None = None

    @property
    def ready(self) -> ReadyPeer:
        assert self._ready is not None, f"{self.peer.name} was not opened"
        return self._ready

    @property
    def pid(self) -> int | None:
        """The root of the server's processes, if it is known."""
        return self.peer.pid

    async def begin(self) -> None:
        """Called once, before all turns. Raises ValueError or RuntimeError if the server cannot be used."""
        self._ready = await prepare(self.peer, seed=self._seed)

    async def open(self) -> None:
        """Called before each turn: returns when the server can answer."""

    async def close(self) -> None:
        """Called after each turn."""

    async def end(self) -> None:
        """Called after the last turn, or an error."""

    def record(self) -> Server:
        """The server's entry in the result file."""
        return self.ready.server


@dataclass(frozen=True)
class Launch:
    """How a server is started. patience: seconds until its first answer; num_starts: so many, to time the start"""

    command: str
    probe: Exchange
    patience: float
    num_starts: int = 1


class LaunchingHost(RunningHost):
    """A server that is started before the first turn and ended after the last."""

    def __init__(self, peer: Peer, launch: Launch, *, seed: int) -> None:
        super().__init__(peer, seed=seed)
        self._launch = launch
        self._server: LaunchedServer | None = None
        self._start_seconds: list[float] = []

    @property
    def pid(self) -> int | None:
        return None if self._server is None else self._server.pid

    async def begin(self) -> None:
        for _ in range(self._launch.num_starts):
            await self.end()
            await self._start()

    async def end(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop()

    def record(self) -> Server:
        return replace(self.ready.server, command=without_keys(self._launch.command), start_seconds=self._start_seconds)

    async def _start(self) -> None:
        target, launch = self.peer.target, self._launch
        await check_nobody_answers(target.base_url)
        self._server = LaunchedServer(self.peer.name, launch.command)
        seconds = await self._server.wait_until_ready(target, launch.probe, patience=launch.patience)
        self._start_seconds.append(seconds)
        if self._ready is None:
            self._ready = await prepare(self.peer, seed=self._seed)
        self._ready = replace(self._ready, peer=replace(self._ready.peer, pid=self._server.pid))


class RestartingHost(LaunchingHost):
    """A server that runs during its own turns only: others have all the memory meanwhile."""

    async def begin(self) -> None:
        """Does nothing: the server must not run in the others' turns."""

    async def open(self) -> None:
        await self._start()

    async def close(self) -> None:
        await self.end()
