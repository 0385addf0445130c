"""The outbox: what the engine has put out for one reader, who may read several requests as one."""

from __future__ import annotations

import asyncio
from collections import deque

from engine.types import StepOutput


class Outbox:
    """Outputs in the order in which they came, and the error that ends them. For one reader, within one event loop.

    A step that puts out something for each of the reader's requests wakes the reader once: it runs when the whole step
    is here.
    """

    def __init__(self) -> None:
        self._outputs: deque[StepOutput] = deque()
        self._error: Exception | None = None
        self._news: asyncio.Future[None] | None = None  # that the reader waits for

    def put(self, output: StepOutput) -> None:
        """After an error, outputs are dropped."""
        if self._error is None:
            self._outputs.append(output)
            self._wake()

    def fail(self, error: Exception) -> None:
        """Raises the error to the reader when it has taken what came before; the first error counts."""
        if self._error is None:
            self._error = error
            self._wake()

    def cut(self, error: Exception) -> None:
        """Raises the error, or the one that came before it, to the reader at once: what came before is dropped."""
        self._outputs.clear()
        self.fail(error)

    async def take(self, max_num: int) -> list[StepOutput]:
        """The next outputs: at least one, at most `max_num`. Waits only if none is here."""
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._news = asyncio.get_running_loop().create_future()
            try:
                await self._news
            finally:
                self._news = None
        if len(self._outputs) > max_num:
            return [self._outputs.popleft() for _ in range(max_num)]
        taken = list(self._outputs)
        self._outputs.clear()
        return taken

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
