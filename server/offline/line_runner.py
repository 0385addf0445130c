"""The runner of lines: sends them as fast as there are places, and sees to it that each has one answer."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from server.offline.answer_lines import AnswerLine, answer_of, error_of
from server.offline.fair_slots import FairSlots
from server.offline.request_lines import BadLine, Line, RequestLine

logger = logging.getLogger("peregrine.server")

FIRST_DELAY = 0.5  # seconds before a line that was refused is sent again; doubled each time
MAX_DELAY = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. is_refusal: nothing was computed, and the line may be sent again, after `retry_after` seconds."""

    status: int
    request_id: str
    body: bytes
    is_refusal: bool = False
    retry_after: float | None = None


class UnreachableError(Exception):
    """Nothing came back: the connection could not be made, or broke."""


class RunEndedError(Exception):
    """No line can be answered from now on. The message says why; those without an answer are left as they are."""


class Dispatcher(Protocol):
    """The interface of where lines are answered."""

    async def send(self, line: RequestLine) -> Reply:
        """Raises UnreachableError and RunEndedError."""
        ...


class AnswerKeeper(Protocol):
    """The interface of where answers go."""

    async def keep(self, line: AnswerLine) -> None:
        """Returns when the line is kept. Raises OSError."""
        ...


class Patience:
    """How long a run goes on while nothing but refusals come. `max_seconds`: None for ever."""

    def __init__(self, max_seconds: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_seconds = max_seconds
        self._clock = clock
        self._answered_at = clock()

    def note_answer(self) -> None:
        self._answered_at = self._clock()

    def check(self, reason: str) -> None:
        """Raises RunEndedError when there was no answer for too long."""
        seconds = self._clock() - self._answered_at
        if self._max_seconds is not None and seconds > self._max_seconds:
            raise RunEndedError(f"no answer has come for {seconds:.0f} s: {reason}")


class LineRunner:
    """One file's lines on their way. `run` it once."""

    def __init__(
        self, dispatcher: Dispatcher, keeper: AnswerKeeper, slots: FairSlots, *, owner: str = "",
        patience: Patience | None = None, seconds_between: Callable[[int], float] | None = None,
    ) -> None:  # fmt: skip
        """owner: for whom places are taken. seconds_between: how long to wait after so many refusals of a line."""
        self._dispatcher, self._keeper, self._slots, self._owner = dispatcher, keeper, slots, owner
        self._patience = patience or Patience(None)
        self._seconds_between = seconds_between or _backoff
        self._stopping = asyncio.Event()
        self._failure: RunEndedError | OSError | None = None

    def stop(self) -> None:
        """Lets `run` return when the lines in work are answered; those that were refused are left."""
        self._stopping.set()

    async def run(self, lines: AsyncIterator[Line]) -> None:
        """Returns when all lines have been answered, or those in work after `stop`. Cancelling it leaves them.

        Raises RunEndedError, and OSError where answers cannot be kept; the lines in work are answered before.
        """
        async with asyncio.TaskGroup() as group:
            async for line in lines:
                if self._stopping.is_set():
                    break
                size = len(line.body) if isinstance(line, RequestLine) else 0
                await self._slots.take(self._owner, size)
                if self._stopping.is_set():
                    self._slots.give_back(size)
                    break
                group.create_task(self._work(line, size))
        if self._failure is not None:
            raise self._failure

    async def _work(self, line: Line, size: int) -> None:
        try:
            if isinstance(line, BadLine):
                answer: AnswerLine | None = error_of(line, code=line.code, message=line.message)
            else:
                answer = await self._answer(line)
            if answer is not None:
                await self._keeper.keep(answer)
        except (RunEndedError, OSError) as error:
            self._failure = self._failure or error
            self.stop()
        finally:
            self._slots.give_back(size)

    async def _answer(self, line: RequestLine) -> AnswerLine | None:
        """None: it was stopped before it had one."""
        for attempt in range(1 << 30):
            delay = 0.0
            try:
                reply = await self._dispatcher.send(line)
            except UnreachableError as error:
                self._patience.check(str(error))
            else:
                if not reply.is_refusal:
                    self._patience.note_answer()
                    return answer_of(line, status=reply.status, request_id=reply.request_id, body=reply.body)
                self._patience.check(f"status {reply.status}: {reply.body[:300].decode(errors='replace')}")
                delay = reply.retry_after or 0.0
            await self._sleep(max(delay, self._seconds_between(attempt)))
            if self._stopping.is_set():
                return None
        raise AssertionError("a line was refused without end")

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return


def _backoff(num_refusals: int) -> float:
    return min(FIRST_DELAY * 2.0 ** min(num_refusals, 10), MAX_DELAY) * random.uniform(0.75, 1.25)
