"""Rendering of chat templates in worker processes, which are replaced when a limit has killed them."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from server.text.template_worker import Render, Rendered
from server.text.worker_limits import frame
from server.text.worker_processes import WorkerEndedError, WorkerProcesses

NUM_WORKERS = 2  # so that one conversation that takes all its time does not hold up every other


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """Of one rendering: processor seconds, characters of the prompt, bytes of memory beyond the process's own."""

    max_seconds: float = 2.0
    max_characters: int = 1 << 24
    max_bytes: int = 512 << 20


class TemplateLimitError(ValueError):
    """A limit of time or memory has ended a rendering."""


class ChatRenderer:
    """Renders conversations, in order of arrival, a few at once. One serves any number of templates and event loops."""

    def __init__(self, limits: TemplateLimits | None = None) -> None:
        self.limits = limits or TemplateLimits()
        self._workers = WorkerProcesses("server.text.template_worker", NUM_WORKERS, name="chat-template")

    def start(self) -> None:
        """Begins to start the processes, which import for half a second."""
        self._workers.start()

    def close(self) -> None:
        self._workers.close()

    async def render(self, request: Render) -> str:
        """Raises ValueError where the template refuses the conversation, TemplateLimitError where a limit does."""
        rendered = await self._ask(request)
        if rendered.text is None:
            kind = TemplateLimitError if rendered.was_limit else ValueError
            raise kind(f"the model's chat template refused the messages: {rendered.reason}")
        return rendered.text

    async def _ask(self, request: Render) -> Rendered:
        try:
            answer = await self._workers.ask(lambda: frame(request), request.max_seconds)
        except (OverflowError, RecursionError, UnicodeEncodeError) as error:
            return Rendered(None, f"they cannot be given to it: {error}")
        except WorkerEndedError as ended:
            if ended.was_limit:
                reason = f"it took more than {request.max_seconds:g} s of processor time, or too much memory"
                return Rendered(None, reason, was_limit=True)
            return Rendered(None, "the process that renders it was killed, twice; look for what kills it")
        return msgspec.msgpack.decode(answer, type=Rendered)
