"""What a scenario works with: servers that it starts, clients that know the answers, and a place for what it found."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.client.client import Target
from loadtest.compare.launch import free_ports
from loadtest.operation.account import Crowd
from loadtest.operation.findings import Figure, Findings
from loadtest.operation.served import ServedModel
from loadtest.workload.prompts import WORDS, Exchange

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_MODEL = "smollm2-135m-instruct"
NAME = "model"  # by which clients ask for it
COUNTING = "counting?delay=0.01"
SMALL_MEMORY = ("model.max_model_len=2048", "kv_cache.memory=4096tokens")  # all of it is in use soon
FAULTS = "PEREGRINE_FAULTS"  # tests.support.fault_orders reads it


@dataclass(frozen=True)
class StageOptions:
    """How servers are started, and how much load there is.

    engine: "default" (the real model) or "counting" (tests/support/counting_engine.py, which has none). duration: of
    the part under load, seconds; None: as each scenario has it. settings: of each server, as NAME=VALUE
    """

    engine: str = "default"
    model: str = DEFAULT_MODEL
    duration: float | None = None
    num_clients: int = 16
    max_tokens: int = 48
    seed: int = 0
    settings: tuple[str, ...] = ()

    @property
    def figures(self) -> dict[str, Figure]:
        return {
            "engine": self.engine, "model": self.model, "duration": self.duration, "num_clients": self.num_clients,
            "max_tokens": self.max_tokens, "seed": self.seed, "settings": " ".join(self.settings),
        }  # fmt: skip


@dataclass
class Stage:
    """One run of one scenario. folder: for all files of its servers"""

    options: StageOptions
    folder: Path
    findings: Findings = field(default_factory=Findings)

    def seconds(self, usual: float) -> float:
        return self.options.duration or usual

    @property
    def is_counting(self) -> bool:
        return self.options.engine == "counting"

    def command(self, *, obeys_orders: bool) -> list[str]:
        """Starts a server. obeys_orders: one whose steps fail when `ServedModel.order` says so"""
        if self.is_counting:
            return [sys.executable, "-m", "tests.support.counting_engine", COUNTING]
        if obeys_orders:
            return [sys.executable, "-m", "tests.support.faulty_server", self.options.model]
        return [sys.executable, "-m", "server.cli", "serve", self.options.model]

    @asynccontextmanager
    async def serve(
        self,
        *settings: str,
        obeys_orders: bool = False,
        has_whole_memory: bool = False,
        environment: Mapping[str, str] | None = None,
        api_key: str | None = None,
        folder: Path | None = None,
    ) -> AsyncIterator[ServedModel]:
        """A server that is ready, and ended with all that it started. Raises RuntimeError where it does not get ready.

        settings: as NAME=VALUE. obeys_orders: see `command`. has_whole_memory: as much as a server takes by itself, for
        measurements. api_key: by which the stage itself reads the metrics. folder: for its files, if not of its own
        """
        folder = folder or Path(tempfile.mkdtemp(prefix="server-", dir=self.folder))
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        memory = () if has_whole_memory else SMALL_MEMORY  # else memory that is touched for the first time looks leaked
        given = [word for setting in (*memory, *self.options.settings, *settings) for word in ("--set", setting)]
        own = {"PYTHONPATH": path, FAULTS: str(folder), "XDG_STATE_HOME": str(folder)}
        served = ServedModel(
            [*self.command(obeys_orders=obeys_orders), "--served-model-name", NAME, *given],
            port=free_ports(1)[0],
            folder=folder,
            environment=own | dict(environment or {}),
            api_key=api_key,
        )
        try:
            await served.wait_until_ready()
            yield served
        finally:
            await served.close()

    def target(self, served: ServedModel, *, api_key: str | None = None, timeout: float = 120.0) -> Target:
        return Target(served.url, model=NAME, api_key=api_key, timeout=timeout)

    def exchanges(self, count: int, *, num_words: int = 24, max_tokens: int | None = None) -> list[Exchange]:
        """Prompts that begin differently, so that no two share a prefix."""
        draw = random.Random(self.options.seed)
        prompts = [f"{index} " + " ".join(draw.choices(WORDS, k=num_words)) for index in range(count)]
        return [Exchange(prompt, max_tokens or self.options.max_tokens) for prompt in prompts]

    def crowd(self, served: ServedModel, *, num_prompts: int = 8, num_clients: int | None = None) -> Crowd:
        return Crowd(
            self.target(served), self.exchanges(num_prompts), num_clients=num_clients or self.options.num_clients
        )
