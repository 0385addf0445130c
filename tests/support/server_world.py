"""A server without an engine: a fake engine at the border, real routes, real HTTP where a test asks for it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache

import httpx
from fastapi import FastAPI

from engine.types import RequestTiming
from server.api import chat, completions, embeddings, requests, tokenize
from server.api.messages_api import routes as messages
from server.api.ollama_api import routes as ollama
from server.api.responses_api import routes as responses
from server.cli.serve import make_http_server
from server.config import Config
from server.errors import ApiError, install_error_handlers
from server.http.body_reader import BodyBudget
from server.state import ServerState
from server.structured.grammar_checker import GrammarChecker
from server.telemetry.request_timeline import Ahead
from server.text.chat_renderer import ChatRenderer
from server.text.tokenizer import Tokenizer
from tests.support.fake_engine import CHAT_TEMPLATE, FakeEngine, make_assets, make_engine, make_model

MODEL_NAME = "tiny"


@cache
def make_renderer() -> ChatRenderer:
    """One for all tests: its processes import for half a second."""
    return ChatRenderer()


@cache
def make_checker() -> GrammarChecker:
    """The same for grammars."""
    return GrammarChecker()


class FakePlace(AbstractContextManager):
    ahead = Ahead()

    def hand_over(self, num_tokens: int) -> None:
        """Nobody counts."""

    def end(self, seconds: float | None = None) -> None:
        """Nobody counts."""

    def charge_output(self, num_tokens: int) -> None:
        """Nobody counts."""

    def __exit__(self, *_: object) -> None:
        """Nobody counts."""


class FakeAdmission:
    def __init__(self) -> None:
        self.error: ApiError | None = None
        self.admitted: list[tuple[int, int]] = []

    def check_available(self) -> None:
        if self.error is not None and self.error.status == 503:
            raise self.error

    def check_room(self, tenant: str) -> None:
        """There is some, until the whole request is known."""

    def check_size(self, num_requests: int, num_tokens: int) -> None:
        """Nothing is too large."""

    def admit(self, num_requests: int, num_tokens: int, tenant: str = "") -> FakePlace:
        if self.error is not None:
            raise self.error
        self.admitted.append((num_requests, num_tokens))
        return FakePlace()


@dataclass
class FakeMetrics:
    """Notes what it is told."""

    num_arrived: int = 0
    outcomes: list[str] = field(default_factory=list)
    usages: list[object] = field(default_factory=list)
    num_tokens: int = 0
    num_first_tokens: int = 0

    def request_arrived(self) -> None:
        self.num_arrived += 1

    def request_rejected(self, outcome: str, status: int) -> None:
        assert 400 <= status < 600
        self.outcomes.append(outcome)

    def request_started(self, num_choices: int, max_tokens: int) -> None:
        assert num_choices > 0
        assert max_tokens > 0

    def request_finished(
        self, outcome: str, status: int, usage: object, seconds: float, timing: RequestTiming | None
    ) -> None:
        assert seconds >= 0
        assert (status == 200) == (outcome in ("stop", "length")) or outcome == "timeout"
        self.outcomes.append(outcome)
        self.usages.append(usage)

    def first_token(self, seconds: float) -> None:
        self.num_first_tokens += 1

    def tokens_delivered(self, num_tokens: int, seconds_since_last: float | None) -> None:
        self.num_tokens += num_tokens


class NamesRequests:
    """The part of the real application that gives a request its id and tenant."""

    def __init__(self, app: object) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: object, send: object) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"x-request-id")
            state = scope.setdefault("state", {})
            state["request_id"] = given.decode() if given else f"made-up-{time.monotonic_ns()}"
            state["tenant"], state["is_operator"] = "", True
        await self.app(scope, receive, send)


@dataclass
class World:
    """Everything a test may look at or turn."""

    app: FastAPI
    engine: FakeEngine
    metrics: FakeMetrics
    admission: FakeAdmission
    state: ServerState
    tokenizer: Tokenizer

    def configure(self, config: dict) -> None:
        self.state.config = Config.model_validate(config)

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Real HTTP on a port of its own; yields the address."""
        with serve_app(self.app, lifespan="off") as url:
            yield url


@contextmanager
def serve_app(app: FastAPI, *, lifespan: str) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = make_http_server(app, app.state.server.config, lifespan=lifespan)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def make_world(template: str | None = CHAT_TEMPLATE, *, tokenizer: Tokenizer | None = None) -> World:
    """tokenizer: another one than that of `make_tokenizer`"""
    engine = make_engine(template) if tokenizer is None else FakeEngine(make_model(make_assets(), 330), tokenizer)
    admission, metrics = FakeAdmission(), FakeMetrics()
    app = FastAPI()
    app.add_middleware(NamesRequests)
    install_error_handlers(app)
    for module in (completions, chat, responses, messages, embeddings, ollama, tokenize, requests):
        app.include_router(module.router)
    state = ServerState(
        config=Config(), engine=engine, admission=admission, metrics=metrics, tokenizer=engine.tokenizer,
        model_names=[MODEL_NAME, "other-name"], started_at=time.monotonic(), body_budget=BodyBudget(2**25),
        chat_renderer=make_renderer(), grammar_checker=make_checker(),
    )  # fmt: skip
    app.state.server = state
    return World(app, engine, metrics, admission, state, engine.tokenizer)


def connect(world: World) -> httpx.AsyncClient:
    """A client without a network between it and the application."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=world.app), base_url="http://test")


def events(body: str) -> list[dict]:
    """The events of a stream, which must end in [DONE]."""
    lines = [line for line in body.split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines), body
    assert lines[-1] == "data: [DONE]", body
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
