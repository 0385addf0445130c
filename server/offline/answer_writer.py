"""The writer of answers: appends them to their files off the event loop, those that came together in one write."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from server.offline.answer_file import AnswerFile, is_full
from server.offline.answer_lines import AnswerLine

logger = logging.getLogger("peregrine.server")

SYNC_SECONDS = 10.0  # of answers, that a loss of power may cost
FULL_SECONDS = 10.0  # between attempts to write to a full disk

_Pending = tuple[AnswerLine, asyncio.Future[None]]


class AnswerWriter:
    """Use as `async with`: leaving it writes what was given to it. The files are its own meanwhile."""

    def __init__(
        self,
        answers: AnswerFile,
        errors: AnswerFile,
        *,
        waits_for_room: bool,
        written: Callable[[AnswerLine], None] = lambda _: None,
    ) -> None:
        """errors: where lines go that have no answer; may be the same file
        waits_for_room: a full disk delays answers, instead of ending the run with an OSError
        written: told of each line that is in its file
        """
        self._answers, self._errors = answers, errors
        self._waits_for_room = waits_for_room
        self._written = written
        self._pending: list[_Pending] = []
        self._has_more = asyncio.Event()
        self._closing = asyncio.Event()
        self._all_written = asyncio.Event()
        self._all_written.set()
        self._synced_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> AnswerWriter:
        self._task = asyncio.create_task(self._write_all())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._closing.set()
        self._has_more.set()
        await asyncio.shield(self._task)

    async def keep(self, line: AnswerLine) -> None:
        """Returns when the line is in its file. Raises OSError where it cannot be, or will not be waited for."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((line, written))
        self._has_more.set()
        self._all_written.clear()
        await written

    async def flush(self) -> None:
        """Returns when nothing waits to be written, also of tasks that were cancelled."""
        await self._all_written.wait()

    async def _write_all(self) -> None:
        while True:
            await self._has_more.wait()
            self._has_more.clear()
            pending, self._pending = self._pending, []
            if pending:
                await self._write(pending)
            if not self._pending:
                self._all_written.set()
            if self._closing.is_set() and not self._pending:
                return

    async def _write(self, pending: list[_Pending]) -> None:
        for file in dict.fromkeys((self._answers, self._errors)):
            lines = [(line, done) for line, done in pending if self._file_of(line) is file]
            if not lines:
                continue
            try:
                await self._append(file, [line.data for line, _ in lines])
            except OSError as error:
                for _, done in lines:
                    if not done.done():
                        done.set_exception(error)
                continue
            for line, done in lines:
                self._written(line)
                if not done.done():  # its task may have been cancelled
                    done.set_result(None)

    def _file_of(self, line: AnswerLine) -> AnswerFile:
        return self._answers if line.is_ok else self._errors

    async def _append(self, file: AnswerFile, lines: Iterable[bytes]) -> None:
        data = b"".join(lines)
        while True:
            try:
                await asyncio.to_thread(self._append_now, file, data)
                return
            except OSError as error:
                if not self._waits_for_room or not is_full(error) or self._closing.is_set():
                    raise
                logger.error(
                    "%s: %s: answers wait, and are written when there is room", file.path, error.strerror or error
                )
                with suppress(TimeoutError):
                    async with asyncio.timeout(FULL_SECONDS):
                        await self._closing.wait()

    def _append_now(self, file: AnswerFile, data: bytes) -> None:
        file.append(data)
        now = time.monotonic()
        if now - self._synced_at >= SYNC_SECONDS:
            self._synced_at = now
            file.sync()
