"""One batch of a server, from its validation to its files. It may be ended at any point, and run again from there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Literal, Protocol

from msgspec.structs import replace

from server.offline.answer_file import AnswerFile, is_full
from server.offline.answer_lines import AnswerLine, TokenUsage, error_of
from server.offline.answer_writer import AnswerWriter
from server.offline.batch_folder import BatchFolder, seconds_now
from server.offline.fair_slots import FairSlots
from server.offline.line_keys import KeyCollector, SealedKeys
from server.offline.line_runner import Dispatcher, LineRunner, RunEndedError
from server.offline.pieces import in_pieces
from server.offline.records import (
    BatchError,
    BatchRecord,
    BatchUsage,
    FileRecord,
    InputTokensDetails,
    RequestCounts,
)
from server.offline.request_lines import BadLine, Line, RequestLine, read_lines

logger = logging.getLogger("peregrine.server")

MAX_ERRORS = 100  # of a file, that a failed batch names
FULL_SECONDS = 10.0  # between attempts to write a record to a full disk
LINES_AT_ONCE = 256  # that are written off as expired or cancelled

End = Literal["completed", "expired", "cancelled"]
REASONS = {
    "expired": ("batch_expired", "this request was not executed before the batch's completion window expired"),
    "cancelled": ("batch_cancelled", "this request was not executed before the batch was cancelled"),
}


class Surroundings(Protocol):
    """The interface of the server to its batches."""

    @property
    def is_ending(self) -> bool: ...

    @property
    def max_lines(self) -> int: ...

    @property
    def max_line_bytes(self) -> int: ...

    def dispatcher(self, owner: str) -> Dispatcher: ...

    def seconds_kept(self, record: BatchRecord) -> int:
        """That its files are kept."""
        ...

    async def until_ready(self) -> None:
        """Returns when lines can be answered."""
        ...

    def count(self, outcome: str) -> None:
        """Counts a line: completed, failed, expired, cancelled."""
        ...


class BatchRun:
    """A batch while it is not finished. `run` it once; all but `run` may be called meanwhile, in the event loop."""

    def __init__(
        self, record: BatchRecord, folder: BatchFolder, surroundings: Surroundings,
        slots: FairSlots, turn: asyncio.Semaphore,
    ) -> None:  # fmt: skip
        """turn: of the owner's batches, of which only some are in work at once"""
        self._record = record
        self._folder, self._surroundings, self._slots, self._turn = folder, surroundings, slots, turn
        self._cancelled = asyncio.Event()
        if record.status == "cancelling":
            self._cancelled.set()
        self._saving = asyncio.Lock()
        self._done = KeyCollector()
        self._num_completed, self._num_failed = record.counts.completed, record.counts.failed
        self._usage = TokenUsage()
        self._outcome = "failed"  # of lines that have no answer
        self._was_cut = False

    @property
    def record(self) -> BatchRecord:
        """As it is now."""
        counts = RequestCounts(self._record.counts.total, self._num_completed, self._num_failed)
        return replace(self._record, counts=counts)

    async def cancel(self) -> None:
        """Lets the batch end soon, with the answers that it has. Raises OSError where that cannot be kept."""
        if not self._cancelled.is_set():
            await self._save(status="cancelling", cancelling_at=seconds_now())
            self._cancelled.set()

    async def run(self) -> None:
        """Returns when the batch is finished, or can go on no further in this server."""
        try:
            if self._record.in_progress_at is None and not await self._validate():
                return
            if self._record.in_progress_at is None and not self._cancelled.is_set():
                await self._keep_trying(lambda: self._save(status="in_progress", in_progress_at=seconds_now()))
            if self._record.in_progress_at is not None:
                await self._answer()
            else:
                await self._keep_trying(lambda: self._save(status="cancelled", cancelled_at=seconds_now()))
        except RunEndedError as ended:
            logger.info("batch %s goes on at the next start: %s", self._record.id, ended)
        except FileNotFoundError:
            message = f"the content of file {self._record.input_file_id} is gone from the server's folder"
            await self._fail([BatchError(code="input_file_not_found", message=message)])
        except OSError as error:
            logger.error("batch %s goes on at the next start: the disk fails: %s", self._record.id, error)
        except Exception as error:  # the border: a mistake, or a disk that fails, ends this batch and no other
            logger.exception("batch %s failed", self._record.id)
            await self._fail([BatchError(code="internal_error", message=f"the server failed: {type(error).__name__}")])

    # Validation

    async def _validate(self) -> bool:
        """Whether every line can be sent. Else the batch has failed, and its errors say why."""
        keys, errors, total = KeyCollector(), [], 0
        async for line in in_pieces(self._lines()):
            if self._surroundings.is_ending:
                raise RunEndedError("the server ends")
            if self._cancelled.is_set():
                return True
            total += 1
            if isinstance(line, BadLine):
                errors.append(BatchError(code=line.code, message=line.message, param=line.param, line=line.number))
            else:
                keys.add(line.key)
            if total > self._surroundings.max_lines:
                most = self._surroundings.max_lines
                message = f"the file has more than {most} requests (batches.max_lines); split it into several batches"
                errors.append(BatchError(code="too_many_requests", message=message))
            if len(errors) >= MAX_ERRORS or total > self._surroundings.max_lines:
                break
        if not total:
            errors.append(BatchError(code="empty_file", message="the file has no line; write a request in each"))
        if not errors and (repeated := keys.sealed().repeated()):
            errors = await self._name_repeated(repeated)
        self._record = replace(self._record, counts=RequestCounts(total))
        if errors:
            await self._fail(errors)
        return not errors

    async def _name_repeated(self, repeated: frozenset[bytes]) -> list[BatchError]:
        first: dict[bytes, int] = {}
        errors: list[BatchError] = []
        async for line in in_pieces(self._lines()):
            if line.key not in repeated or not isinstance(line, RequestLine):
                continue
            before = first.setdefault(line.key, line.number)
            if before != line.number and len(errors) < MAX_ERRORS:
                message = f"line {line.number}: custom_id is that of line {before}; give each line one of its own"
                errors.append(
                    BatchError(code="duplicate_custom_id", message=message, param="custom_id", line=line.number)
                )
        return errors

    async def _fail(self, errors: list[BatchError]) -> None:
        await self._keep_trying(lambda: self._save(status="failed", failed_at=seconds_now(), errors=errors))

    # Answers

    async def _answer(self) -> None:
        record = self._record
        output, errors = self._folder.data_path(record.output_id), self._folder.data_path(record.error_id)
        with AnswerFile(output) as answers, AnswerFile(errors) as failures:
            await self._read_done(answers, failures)
            async with AnswerWriter(answers, failures, waits_for_room=True, written=self._note) as writer:
                end = await self._run_lines(writer)
                if end == "completed":
                    await self._keep_trying(lambda: self._save(status="finalizing", finalizing_at=seconds_now()))
                else:
                    await self._write_off(writer, end)
            await self._keep_trying(lambda: asyncio.to_thread(answers.sync))
            await self._keep_trying(lambda: asyncio.to_thread(failures.sync))
            sizes = (answers.size, failures.size)
        await self._publish(end, *sizes)

    async def _read_done(self, *files: AnswerFile) -> None:
        """What was answered before counts, and is not asked again."""
        self._num_completed = self._num_failed = 0
        self._done, self._usage = KeyCollector(), TokenUsage()
        for file in files:
            async for answer in in_pieces(file.answers()):
                self._count(answer)

    async def _run_lines(self, writer: AnswerWriter) -> End:
        """Sends the lines until all are answered, the batch is cancelled, or its time is over."""
        runner = LineRunner(
            self._surroundings.dispatcher(self._record.owner), writer, self._slots, owner=self._record.owner
        )
        running = asyncio.create_task(self._in_turn(runner))
        cancelled = asyncio.create_task(self._cancelled.wait())
        seconds = max(self._record.expires_at - time.time(), 0.0)
        try:
            await asyncio.wait({running, cancelled}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
                if self._was_cut:
                    raise RunEndedError("the server ends")
                return "completed"
            return "cancelled" if self._cancelled.is_set() else "expired"
        finally:
            for task in (running, cancelled):
                task.cancel()
            await asyncio.gather(running, cancelled, return_exceptions=True)

    async def _in_turn(self, runner: LineRunner) -> None:
        async with self._turn:
            await self._surroundings.until_ready()
            await runner.run(self._undone(self._done.sealed()))

    async def _undone(self, done: SealedKeys, *, even_if_ending: bool = False) -> AsyncIterator[Line]:
        async for line in in_pieces(self._lines()):
            if self._surroundings.is_ending and not even_if_ending:
                self._was_cut = True
                return
            if line.key not in done:
                yield line

    async def _write_off(self, writer: AnswerWriter, end: End) -> None:
        """Gives the lines that have no answer an error that says why."""
        await writer.flush()
        self._outcome = end
        code, message = REASONS[end]
        lines: list[AnswerLine] = []
        async for line in self._undone(self._done.sealed(), even_if_ending=True):
            lines.append(error_of(line, code=code, message=message))
            if len(lines) == LINES_AT_ONCE:
                await asyncio.gather(*map(writer.keep, lines))
                lines = []
        await asyncio.gather(*map(writer.keep, lines))

    def _note(self, answer: AnswerLine) -> None:
        self._count(answer)
        self._surroundings.count("completed" if answer.is_ok else self._outcome)

    def _count(self, answer: AnswerLine) -> None:
        self._done.add(answer.key)
        self._usage.add(answer.usage)
        if answer.is_ok:
            self._num_completed += 1
        else:
            self._num_failed += 1

    def _lines(self) -> Iterator[Line]:
        return read_lines(
            self._folder.data_path(self._record.input_file_id),
            max_line_bytes=self._surroundings.max_line_bytes,
            urls=(self._record.endpoint,),
        )

    # Records

    async def _publish(self, end: End, num_output_bytes: int, num_error_bytes: int) -> None:
        record = self._record
        await self._publish_file(record.output_id, "output", num_output_bytes)
        await self._publish_file(record.error_id, "error", num_error_bytes)
        now, usage = seconds_now(), self._usage
        await self._keep_trying(
            lambda: self._save(
                status=end,
                **{f"{end}_at": now},
                has_output=num_output_bytes > 0,
                has_errors=num_error_bytes > 0,
                counts=self.record.counts,
                usage=BatchUsage(
                    usage.prompt_tokens,
                    InputTokensDetails(usage.cached_tokens),
                    usage.output_tokens,
                    total_tokens=usage.prompt_tokens + usage.output_tokens,
                ),
            )
        )

    async def _publish_file(self, file_id: str, kind: str, num_bytes: int) -> None:
        """Makes a file of answers one that clients see, unless nothing is in it."""
        if not num_bytes:
            await asyncio.to_thread(self._folder.data_path(file_id).unlink, missing_ok=True)
            return
        now = seconds_now()
        file = FileRecord(
            id=file_id,
            owner=self._record.owner,
            bytes=num_bytes,
            created_at=now,
            expires_at=now + self._surroundings.seconds_kept(self._record),
            filename=f"{self._record.id}_{kind}.jsonl",
            purpose="batch_output",
        )
        await self._keep_trying(lambda: asyncio.to_thread(self._folder.publish, file))
        self._folder.files[file_id] = file

    async def _save(self, **changes: object) -> None:
        """Changes the record, on the disk first, unless it is finished: that is for good. Raises OSError."""
        async with self._saving:
            if self._record.is_finished:
                return
            changed = replace(self._record, **changes)
            await asyncio.to_thread(self._folder.save, changed)
            self._record = changed
            self._folder.batches[changed.id] = changed

    async def _keep_trying(self, save: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await save()
                return
            except OSError as error:
                if not is_full(error) or self._surroundings.is_ending:
                    raise
                logger.error("batch %s waits for room on the disk: %s", self._record.id, error.strerror)
                await asyncio.sleep(FULL_SECONDS)
