"""The observer that updates the server's state when the engine becomes ready or dies."""

from __future__ import annotations

import asyncio
import logging
import time

from engine.ipc.messages import Failed, ModelInfo, TokenizerAssets
from server.state import ServerState
from server.telemetry.observers import NullObserver
from server.text.tokenizer import Tokenizer

logger = logging.getLogger("peregrine.server")


class StateWatch(NullObserver):
    """Makes the server ready when both the engine and the tokenizer, which is loaded in a thread, are."""

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
