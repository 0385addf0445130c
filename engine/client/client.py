"""The engine client: requests in, outputs out. It hides the engine's process and its deaths."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from engine.client.dispatcher import Dispatcher
from engine.client.engine_process import LaunchedChild, launch_child
from engine.client.journal import EngineError
from engine.client.output_stream import OutputStream
from engine.client.supervisor import EngineObserver, EngineState, SupervisionLimits, Supervisor
from engine.config import EngineConfig
from engine.ipc.messages import Failed, ModelInfo
from engine.types import Request

__all__ = [
    "EngineClient",
    "EngineError",
    "EngineObserver",
    "EngineState",
    "OutputStream",
    "SupervisionLimits",
    "launch_engine",
]

FACTORY = "engine.build:build_engine"


def launch_engine(config: EngineConfig) -> LaunchedChild:
    """Starts the engine process ahead of the client that it is for, so that its imports run beside the server's."""
    return launch_child(FACTORY, heartbeat_interval=SupervisionLimits().heartbeat_interval, config=config)


class EngineClient:
    """Use within one event loop, on a thread that lives as long as the server."""

    def __init__(
        self,
        config: EngineConfig,
        observer: EngineObserver,
        *,
        limits: SupervisionLimits | None = None,
        factory: str = FACTORY,
        first_child: LaunchedChild | None = None,
    ) -> None:
        """first_child: of `launch_engine`"""
        self._dispatcher = Dispatcher(observer)
        self._supervisor = Supervisor(
            config,
            observer,
            self._dispatcher,
            limits=limits or SupervisionLimits(step=config.supervision.step_timeout),
            factory=factory,
            first_child=first_child,
        )

    async def start(self) -> None:
        """Returns at once; the engine loads behind it. Watch `state`, or wait for `failed`."""
        self._supervisor.start()

    async def stop(self) -> None:
        """Ends every request with an EngineError and the engine process with them. No process is left after it."""
        await self._supervisor.stop()

    def generate(self, requests: Sequence[Request]) -> OutputStream:
        """What the engine will put out for all of the requests: `with client.generate(requests) as outputs`."""
        return OutputStream(self._dispatcher, requests)

    @property
    def state(self) -> EngineState:
        return self._supervisor.state

    @property
    def phase(self) -> str:
        """What the start is busy with; "ready" when it is over."""
        return self._supervisor.phase

    @property
    def phase_detail(self) -> str:
        return self._supervisor.phase_detail

    @property
    def model(self) -> ModelInfo | None:
        """What was loaded; kept while the engine restarts."""
        return self._supervisor.model

    @property
    def failure(self) -> Failed | None:
        """Why the engine will not come back."""
        return self._supervisor.failure

    @property
    def failed(self) -> asyncio.Event:
        """Set when the engine will not come back."""
        return self._supervisor.failed

    @property
    def num_restarts(self) -> int:
        return self._supervisor.num_restarts

    @property
    def pid(self) -> int | None:
        """Of the engine process, if one runs."""
        return self._supervisor.pid

    @property
    def num_waiting(self) -> int:
        """Requests that the engine has not started, those that wait for a replay included."""
        return self._dispatcher.journal.num_waiting

    @property
    def num_waiting_tokens(self) -> int:
        return self._dispatcher.journal.num_waiting_tokens

    @property
    def num_background_waiting(self) -> int:
        """Of `num_waiting`, those that nobody waits for."""
        return self._dispatcher.journal.num_background_waiting

    @property
    def num_background_waiting_tokens(self) -> int:
        return self._dispatcher.journal.num_background_waiting_tokens

    @property
    def num_running(self) -> int:
        return self._dispatcher.journal.num_running
