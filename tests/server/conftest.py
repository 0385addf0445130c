"""A server without an engine: a scripted engine at the border, a tokenizer made on the spot, real HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.client.client import EngineError
from engine.ipc.messages import ModelInfo, TokenizerAssets
from engine.types import Request, RequestTiming, StepOutput, TokenLogprobs
from server.api import chat, completions, requests, tokenize
from server.cli.serve import make_http_server
from server.config import Config
from server.errors import ApiError, install_error_handlers
from server.http.body_reader import BodyBudget
from server.state import ServerState
from server.text.chat_renderer import ChatRenderer
from server.text.tokenizer import Tokenizer

SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if shout is defined and shout %}SHOUT{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["hello world of tokens, the quick brown fox jumps over the lazy dog. 你好 世界 🙂🚀 naïve café"] * 3
MODEL_NAME = "tiny"
CONTEXT = 256


@cache
def make_assets(template: str | None = CHAT_TEMPLATE) -> TokenizerAssets:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return TokenizerAssets(
        tokenizer_json=backend.to_str(),
        chat_template=template,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    )


@cache
def make_tokenizer(template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    return Tokenizer(make_assets(template))


@cache
def make_renderer() -> ChatRenderer:
    """One for all tests: its processes import for half a second."""
    return ChatRenderer()


def make_model(assets: TokenizerAssets, vocab_size: int) -> ModelInfo:
    return ModelInfo(
        path="/models/tiny",
        architecture="Tiny",
        num_parameters=1,
        vocab_size=vocab_size,
        trained_context=CONTEXT,
        max_model_len=CONTEXT,
        num_kv_tokens=10 * CONTEXT,
        eos_token_ids=[1],
        generation_defaults={},
        tokenizer=assets,
        fingerprint="fp_test",
        settings={},
        weights={"layers.mlp.down_proj": {"int4": 29, "float16": 1}, "lm_head": {"int8": 1}},
        phase_seconds={},
        bytes_per_second=0.0,
        flops_per_second=0.0,
    )


class FakeEngine:
    """An engine client that says what a script says; without one, tokens that follow from prompt and seed."""

    def __init__(self, model: ModelInfo, tokenizer: Tokenizer) -> None:
        self.model: ModelInfo | None = model
        self.tokenizer = tokenizer
        self.state, self.phase, self.phase_detail, self.failure = "ready", "ready", "", None
        self.num_restarts = self.num_waiting = self.num_waiting_tokens = self.num_running = 0
        self.script: Callable[[Request], list[int]] = self.invent
        self.step_size = 1  # tokens per output
        self.first_delay = self.delay = 0.0  # seconds before the first and before each further output
        self.first_timing: RequestTiming | None = None  # told with the first token
        self.fail_after: int | None = None  # outputs, then the request fails
        self.failure_kind: str | None = None  # an EngineError of this kind; None: an output that says so
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.num_cached_tokens = 0

    def say(self, text: str) -> None:
        """From now on every answer is this text and an end of sequence."""
        self.script = lambda request: [*self.tokenizer.encode(text, add_special_tokens=False), 1]

    def invent(self, request: Request) -> list[int]:
        key = f"{request.prompt_token_ids}:{request.params.seed}".encode()
        digest = hashlib.shake_128(key).digest(request.params.max_tokens)
        return [4 + byte for byte in digest]

    async def generate(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(request)
        self.running.add(request.request_id)
        finished = False
        try:
            await asyncio.sleep(self.first_delay)
            for number, output in enumerate(self.outputs(request)):
                if number == self.fail_after:
                    if self.failure_kind is not None:
                        raise EngineError("the engine broke", kind=self.failure_kind)
                    output = StepOutput(request_id=request.request_id, finish_reason="error", error="it failed")
                if number:
                    await asyncio.sleep(self.delay)
                finished = output.finish_reason is not None
                yield output
                if finished:
                    return
        finally:
            self.running.discard(request.request_id)
            if not finished:
                self.aborted.append(request.request_id)

    def outputs(self, request: Request) -> Iterator[StepOutput]:
        params = request.params
        tokens = self.script(request)[: params.max_tokens]
        stop_at = next((i for i, token in enumerate(tokens) if token in params.stop_token_ids), None)
        tokens = tokens if stop_at is None else tokens[: stop_at + 1]
        if params.prompt_logprobs is not None:
            scored = [self.logprobs(token, params.prompt_logprobs) for token in request.prompt_token_ids[1:]]
            half = len(scored) // 2
            yield StepOutput(request_id=request.request_id, prompt_logprobs=scored[:half])
            yield StepOutput(request_id=request.request_id, prompt_logprobs=scored[half:])
        for start in range(0, len(tokens), self.step_size):
            chunk = tokens[start : start + self.step_size]
            is_last = start + self.step_size >= len(tokens)
            is_stop = is_last and stop_at is not None
            yield StepOutput(
                request_id=request.request_id,
                token_ids=chunk,
                finish_reason=("stop" if is_stop else "length") if is_last else None,
                stop_token_id=chunk[-1] if is_stop else None,
                logprobs=None if params.logprobs is None else [self.logprobs(t, params.logprobs) for t in chunk],
                num_cached_tokens=self.num_cached_tokens,
                timing=self.timing(len(tokens)) if is_last else self.first_timing if start == 0 else None,
            )

    def logprobs(self, token_id: int, num_top: int) -> TokenLogprobs:
        top = [(token_id + i) % 330 for i in range(num_top)]
        return TokenLogprobs(token_id, -0.5, 1, top, [-0.5 - i for i in range(num_top)])

    def timing(self, num_tokens: int) -> RequestTiming:
        return RequestTiming(
            queued=0.0, prefill=0.0, decode=0.0, num_prefill_chunks=1, num_preemptions=0,
            num_drafts=num_tokens, num_accepted_drafts=num_tokens // 2,
        )  # fmt: skip


class FakePlace(AbstractContextManager):
    def hand_over(self, num_tokens: int) -> None:
        """Nobody counts."""

    def end(self) -> None:
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

    def check_size(self, num_requests: int, num_tokens: int) -> None:
        """Nothing is too large."""

    def admit(self, num_requests: int, num_tokens: int) -> FakePlace:
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

    def request_rejected(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def request_started(self, num_choices: int, max_tokens: int) -> None:
        assert num_choices > 0
        assert max_tokens > 0

    def request_finished(self, outcome: str, usage: object, seconds: float, timing: RequestTiming | None) -> None:
        assert seconds >= 0
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
            state["tenant"] = ""
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


def make_engine(template: str | None = CHAT_TEMPLATE) -> FakeEngine:
    return FakeEngine(make_model(make_assets(template), 330), make_tokenizer(template))


def make_world(template: str | None = CHAT_TEMPLATE, *, tokenizer: Tokenizer | None = None) -> World:
    """tokenizer: another one than that of `make_tokenizer`"""
    engine = make_engine(template) if tokenizer is None else FakeEngine(make_model(make_assets(), 330), tokenizer)
    admission, metrics = FakeAdmission(), FakeMetrics()
    app = FastAPI()
    app.add_middleware(NamesRequests)
    install_error_handlers(app)
    for module in (completions, chat, tokenize, requests):
        app.include_router(module.router)
    state = ServerState(
        config=Config(), engine=engine, admission=admission, metrics=metrics, tokenizer=engine.tokenizer,
        model_names=[MODEL_NAME, "other-name"], started_at=time.monotonic(), body_budget=BodyBudget(2**25),
        chat_renderer=make_renderer(),
    )  # fmt: skip
    app.state.server = state
    return World(app, engine, metrics, admission, state, engine.tokenizer)


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture(scope="session")
def assets() -> TokenizerAssets:
    return make_assets()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(world) as client:
        yield client


def connect(world: World) -> httpx.AsyncClient:
    """A client without a network between it and the application."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=world.app), base_url="http://test")


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """Functions that the tests share."""
    return SimpleNamespace(
        wait_until=wait_until, events=events, make_world=make_world, connect=connect, serve_app=serve_app,
        make_engine=make_engine,
    )  # fmt: skip


def events(body: str) -> list[dict]:
    """The events of a stream, which must end in [DONE]."""
    lines = [line for line in body.split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines), body
    assert lines[-1] == "data: [DONE]", body
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
