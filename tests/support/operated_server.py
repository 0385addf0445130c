"""The real application around an engine with a life that a test directs: starting, ready, dying, failing."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from engine.client.client import EngineObserver
from engine.config import EngineConfig
from engine.ipc.messages import Failed, ModelInfo
from engine.types import Request
from server.app import create_app
from server.config import Config
from server.state import ServerState
from tests.support.fake_engine import FakeEngine, FakeStream
from tests.support.fake_engine import make_engine as make_fake_engine
from tests.support.server_world import MODEL_NAME, serve_app, wait_until


class OperatedEngine:
    """An engine client that starts, becomes ready, dies and stops when a test says so; `answers` does the talking."""

    def __init__(self, answers: FakeEngine) -> None:
        self._answers = answers
        self._loaded = answers.model
        self.model: ModelInfo | None = None
        self.state, self.phase, self.phase_detail = "starting", "process", ""
        self.failure: Failed | None = None
        self.num_restarts = self.num_waiting = self.num_waiting_tokens = self.num_running = 0
        self.num_background_waiting = self.num_background_waiting_tokens = 0
        self.failed = asyncio.Event()
        self.observer: EngineObserver
        self.loop: asyncio.AbstractEventLoop
        self.was_stopped = False
        self.is_ready_at_start = True

    @property
    def requests(self) -> list[Request]:
        return self._answers.requests

    def say(self, text: str) -> None:
        self._answers.say(text)

    def generate(self, requests: Sequence[Request]) -> FakeStream:
        return self._answers.generate(requests)

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        if self.is_ready_at_start:
            self.become_ready()

    async def stop(self) -> None:
        self.was_stopped = True
        if self.state != "failed":
            self.state = "stopped"

    def enter(self, phase: str, detail: str) -> None:
        self.phase, self.phase_detail = phase, detail
        self.observer.on_phase(phase, detail)

    def become_ready(self) -> None:
        self.model, self.state, self.phase, self.phase_detail = self._loaded, "ready", "ready", ""
        self.observer.on_ready(self._loaded)

    def die(self) -> None:
        self.state, self.phase = "restarting", "process"
        self.num_restarts += 1
        self.observer.on_death("killed by a test")

    def fail(self, kind: str, message: str) -> None:
        self.state, self.failure = "failed", Failed(kind, message)
        self.failed.set()


@dataclass
class Operation:
    """The real application around an OperatedEngine."""

    app: FastAPI
    engine: OperatedEngine
    state: ServerState
    url: str = ""

    def call(self, act: Callable[..., None], *arguments: object) -> None:
        """Runs it in the server's event loop, and waits until the loop has gone around."""
        done = threading.Event()

        def run() -> None:
            act(*arguments)
            self.engine.loop.call_soon(lambda: self.engine.loop.call_soon(done.set))

        self.engine.loop.call_soon_threadsafe(run)
        assert done.wait(10)

    def raw(self, data: bytes) -> bytes:
        """The answer to bytes that no HTTP client would send."""
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(data)
            connection.settimeout(10)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
                head, _, body = answer.partition(b"\r\n\r\n")
                length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), b"")
                if body and length and len(body) >= int(length.partition(b":")[2]):
                    break
            return answer


@contextmanager
def start_operation(config: dict | None = None, *, ready: bool = True) -> Iterator[Operation]:
    engine = OperatedEngine(make_fake_engine())
    engine.is_ready_at_start = ready

    def make_engine(_: EngineConfig, observer: EngineObserver) -> OperatedEngine:
        engine.observer = observer
        return engine

    named = {"server": {"served_model_name": [MODEL_NAME, "org/other-name"]}}
    for section, values in (config or {}).items():
        named.setdefault(section, {}).update(values)
    app = create_app(Config.model_validate(named), make_engine=make_engine)
    operation = Operation(app, engine, app.state.server)
    with serve_app(app, lifespan="on") as operation.url:
        if ready:
            wait_until(lambda: operation.state.is_ready)
        yield operation
