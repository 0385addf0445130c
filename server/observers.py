"""Who hears what happens to the engine."""

from __future__ import annotations

import asyncio
import logging
import time

from engine.client import EngineObserver
from engine.messages import Failed, ModelInfo, TokenizerAssets
from engine.types import StepStats
from server.state import ServerState
from server.tokenizer import Tokenizer

logger = logging.getLogger("peregrine.server")


class Observers(EngineObserver):
    """Tells several observers, in their order."""

    def __init__(self, *observers: EngineObserver) -> None:
        self._observers = list(observers)

    def add(self, observer: EngineObserver) -> None:
        self._observers.append(observer)

    def on_phase(self, name: str, detail: str) -> None:
        for observer in self._observers:
            observer.on_phase(name, detail)

    def on_ready(self, model: ModelInfo) -> None:
        for observer in self._observers:
            observer.on_ready(model)

    def on_step(self, stats: StepStats) -> None:
        for observer in self._observers:
            observer.on_step(stats)

    def on_started(self, request_id: str, waited_seconds: float) -> None:
        for observer in self._observers:
            observer.on_started(request_id, waited_seconds)

    def on_death(self, reason: str) -> None:
        for observer in self._observers:
            observer.on_death(reason)

    def on_replay(self, num_requests: int) -> None:
        for observer in self._observers:
            observer.on_replay(num_requests)


class Deaf(EngineObserver):
    """Hears nothing; subclasses pick what they need."""

    def on_phase(self, name: str, detail: str) -> None:
        """Nothing."""

    def on_ready(self, model: ModelInfo) -> None:
        """Nothing."""

    def on_step(self, stats: StepStats) -> None:
        """Nothing."""

    def on_started(self, request_id: str, waited_seconds: float) -> None:
        """Nothing."""

    def on_death(self, reason: str) -> None:
        """Nothing."""

    def on_replay(self, num_requests: int) -> None:
        """Nothing."""


class StateWatch(Deaf):
    """Keeps the server's state true: it becomes ready when the engine and the tokenizer are both there."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._loading: asyncio.Task[None] | None = None

    def on_ready(self, model: ModelInfo) -> None:
        if self._state.tokenizer is not None:  # the engine is back after a restart, with the same model
            self._state.become_ready(self._state.tokenizer)
            return
        self._loading = asyncio.get_running_loop().create_task(self._load(model.tokenizer))

    def on_death(self, reason: str) -> None:
        self._state.state_since = time.monotonic()

    async def _load(self, assets: TokenizerAssets) -> None:
        try:
            tokenizer = await asyncio.to_thread(Tokenizer, assets)  # up to a second for large vocabularies
        except Exception as error:  # the tokenizers library raises plain Exception for files that it cannot read
            logger.exception("the tokenizer cannot be used")
            self._state.fail(Failed("model", f"the model's tokenizer cannot be used: {error}"))
        else:
            self._state.become_ready(tokenizer)
