"""A client of the scripted engine in a process of its own, and an observer that remembers what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from engine.client.client import EngineClient, EngineState, SupervisionLimits
from engine.config import EngineConfig, ModelConfig, SupervisionConfig
from engine.ipc.messages import ModelInfo
from engine.types import Request, SamplingParams, StepOutput, StepStats
from tests.support import scripted_engine

FACTORY = f"{scripted_engine.__file__}:build"
QUICK = SupervisionLimits(heartbeat_interval=0.2, silence=2.0, step=1.5, check_interval=0.1, first_backoff=0.02)


@dataclass
class Recorder:
    phases: list[tuple[str, str]] = field(default_factory=list)
    models: list[ModelInfo] = field(default_factory=list)
    steps: list[StepStats] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    replays: list[int] = field(default_factory=list)

    def on_phase(self, name: str, detail: str) -> None:
        self.phases.append((name, detail))

    def on_ready(self, model: ModelInfo) -> None:
        self.models.append(model)

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_started(self, request_id: str, waited_seconds: float) -> None:
        assert waited_seconds >= 0
        self.started.append(request_id)

    def on_death(self, reason: str) -> None:
        self.deaths.append(reason)

    def on_replay(self, num_requests: int) -> None:
        self.replays.append(num_requests)


def make_config(options: str = "", *, supervision: SupervisionConfig | None = None) -> EngineConfig:
    return EngineConfig(model=ModelConfig(path=f"scripted?{options}"), supervision=supervision or SupervisionConfig())


def make_client(
    options: str = "",
    *,
    limits: SupervisionLimits = QUICK,
    observer: Recorder | None = None,
    supervision: SupervisionConfig | None = None,
) -> EngineClient:
    config = make_config(options, supervision=supervision)
    return EngineClient(config, observer or Recorder(), limits=limits, factory=FACTORY)


@contextlib.asynccontextmanager
async def running(
    options: str = "",
    *,
    limits: SupervisionLimits = QUICK,
    observer: Recorder | None = None,
    supervision: SupervisionConfig | None = None,
) -> AsyncGenerator[EngineClient, None]:
    """A client whose engine is ready; nothing is left of it after."""
    client = make_client(options, limits=limits, observer=observer, supervision=supervision)
    await client.start()
    try:
        await until(lambda: client.state is EngineState.READY)
        yield client
    finally:
        await client.stop()


async def until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.005)


def make_request(name: str, *, order: int = 1, num_prompt_tokens: int = 12, max_tokens: int = 40, **params) -> Request:
    prompt = [order, *range(100, 99 + num_prompt_tokens)]
    params = SamplingParams(seed=hash(name) % 1000, max_tokens=max_tokens, **params)
    return Request(request_id=name, prompt_token_ids=prompt, params=params)


async def read_one(client: EngineClient, request: Request) -> AsyncGenerator[StepOutput, None]:
    """All outputs of one request, one at a time. Leaving it leaves the request."""
    finish_reason = None
    with client.generate([request]) as outputs:
        while finish_reason is None:
            (output,) = await outputs.take(1)
            finish_reason = output.finish_reason
            yield output


async def collect(client: EngineClient, request: Request) -> list[StepOutput]:
    return [output async for output in read_one(client, request)]


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def process_state(pid: int) -> str:
    """One letter of /proc, as in ps; "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
