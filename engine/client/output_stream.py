"""The output stream: the outputs of several requests for the one reader that sent them."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from engine.client.dispatcher import Dispatcher
from engine.client.journal import Entry
from engine.client.outbox import Outbox
from engine.types import Request, StepOutput


class OutputStream(AbstractContextManager["OutputStream"]):
    """Entering it sends the requests, leaving it aborts those that have not ended. Within one event loop.

    Before the engine is ready, and while it restarts, the stream simply waits. The last output of a request has a
    finish reason. What the reader has not taken stays here as the engine's numbers.
    """

    def __init__(self, dispatcher: Dispatcher, requests: Sequence[Request]) -> None:
        self._dispatcher = dispatcher
        self._requests = requests
        self._entries: dict[str, Entry] = {}  # by request id
        self._outbox = Outbox()

    def __enter__(self) -> Self:
        """Raises ValueError if an id is in use, EngineError if the engine will not come back."""
        try:
            for request in self._requests:
                self._entries[request.request_id] = self._dispatcher.register(request, self._outbox)
        except BaseException:
            self._leave_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave_all()

    def take(self, max_num: int) -> Awaitable[list[StepOutput]]:
        """What has come, of any of the requests in the order in which it came: at least one output, at most `max_num`.

        Waits only if nothing is here. Raises EngineError if one of the requests cannot be finished, when all that came
        before was taken; nothing follows then.
        """
        return self._outbox.take(max_num)

    def leave(self, request_id: str) -> None:
        """Aborts one of the requests, unless it has ended. What of it came before may still be taken."""
        self._dispatcher.leave(self._entries[request_id])

    def fail(self, error: Exception) -> None:
        """Lets `take` raise the error when all that has come was taken: it waits no longer."""
        self._outbox.fail(error)

    def cut(self, error: Exception) -> None:
        """Lets `take` raise the error from now on, whatever has come."""
        self._outbox.cut(error)

    def _leave_all(self) -> None:
        for entry in self._entries.values():
            self._dispatcher.leave(entry)
