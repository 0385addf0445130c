"""The files and batches of a server: what the routes ask of them, by owner, and the tasks that run the batches."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from starlette.types import ASGIApp

from server.config import BatchesConfig
from server.errors import ApiError, bad_request
from server.http.auth import ApiKeys
from server.offline.batch_folder import BATCH_ID, FILE_ID, BatchFolder, new_batch_id, new_file_id, seconds_now
from server.offline.batch_run import BatchRun
from server.offline.fair_slots import FairSlots
from server.offline.in_process import InProcess
from server.offline.records import STATUSES, BatchRecord, FileRecord

logger = logging.getLogger("peregrine.server")
RecordT = TypeVar("RecordT", FileRecord, BatchRecord)

WINDOW = "24h"
WINDOW_SECONDS = 86400
DAY = 86400
MAX_IN_WORK = 4  # batches of one owner; others of its wait
HOUSEKEEPING_SECONDS = 300.0
LINE_OUTCOMES = ("completed", "failed", "expired", "cancelled")
MAX_UPLOADS = 16  # at once
MAX_UPLOADS_PER_KEY = 4
UPLOAD_RETRY_SECONDS = 2.0
RETRY_SECONDS = 30.0  # after which a key that has too many batches may try again


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What batches need of the server. app: its routes, for lines. num_seats: how many sequences run at once."""

    app: ASGIApp
    urls: frozenset[str]
    keys: ApiKeys
    model_name: str
    max_line_bytes: int
    is_ending: Callable[[], bool]
    num_seats: Callable[[], int]
    until_ready: Callable[[], asyncio.Future[bool]]


@dataclass(eq=False, slots=True)
class Incoming:
    """An upload that is being written: how many bytes it has so far."""

    owner: str
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Page(Generic[RecordT]):
    """A part of a list. has_more: behind it."""

    records: list[RecordT]
    has_more: bool


class BatchService:
    """One server's offline work. Made before the event loop; all else in it."""

    def __init__(self, folder: BatchFolder, config: BatchesConfig, host: Host) -> None:
        self.folder = folder
        self.config = config
        self.host = host
        self.line_counts: Counter[str] = Counter(dict.fromkeys(LINE_OUTCOMES, 0))
        self._incoming: list[Incoming] = []
        self._slots = FairSlots(self._num_places)
        self._runs: dict[str, BatchRun] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(MAX_IN_WORK))
        self._housekeeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Goes on with the batches that are not finished, the oldest first."""
        for record in sorted(self.folder.batches.values(), key=lambda record: record.created_at):
            if not record.is_finished:
                self._begin(record)
        self._housekeeping = asyncio.create_task(self._keep_house())

    async def stop(self) -> None:
        """Leaves batches as they are, to go on at the next start."""
        tasks = [*self._tasks.values(), *([self._housekeeping] if self._housekeeping is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.folder.close()

    def owner_of(self, tenant: str) -> str:
        return self.host.keys.owner_of(tenant, self.folder.secret)

    # Files

    @contextmanager
    def incoming(self, owner: str) -> Iterator[Incoming]:
        """Around an upload. Raises ApiError where it has no room: 400, 429, or 507 if there is none for anybody."""
        own = sum(other.owner == owner for other in self._incoming)
        if own >= MAX_UPLOADS_PER_KEY or len(self._incoming) >= MAX_UPLOADS:
            message = f"{len(self._incoming)} files are being uploaded, {own} of them with this API key; try again"
            raise ApiError(429, message, code="too_many_uploads", retry_after=UPLOAD_RETRY_SECONDS)
        upload = Incoming(owner)
        self._incoming.append(upload)
        try:
            self.check_room(upload)
            yield upload
        finally:
            self._incoming.remove(upload)

    def check_room(self, upload: Incoming) -> None:
        """Raises ApiError if it has no room, with the bytes that it has so far."""
        self._check_num_files(upload.owner, 0)
        size = sum(record.bytes for record in self.folder.files.values() if record.owner == upload.owner)
        size += sum(other.num_bytes for other in self._incoming if other.owner == upload.owner)
        if size > self.config.max_key_bytes:
            raise bad_request(
                f"the files of this API key would have {size} bytes, and may have {self.config.max_key_bytes} "
                "(batches.max_key_bytes); delete some",
                code="too_many_bytes",
            )
        total = self.num_file_bytes() + sum(other.num_bytes for other in self._incoming)
        if total > self.config.max_total_bytes:
            raise ApiError(
                507,
                f"all files would have {total} bytes, and may have {self.config.max_total_bytes} "
                "(batches.max_total_bytes); delete files, or ask the server's operator for more",
            )

    def _check_num_files(self, owner: str, num_to_come: int) -> None:
        num_files = sum(record.owner == owner for record in self.folder.files.values()) + num_to_come
        if num_files >= self.config.max_files:
            raise bad_request(
                f"this API key has {num_files} files, those of unfinished batches included, as many as "
                "batches.max_files allows; delete some",
                code="too_many_files",
            )

    async def add_file(
        self, owner: str, incoming: Path, *, num_bytes: int, filename: str, seconds: int | None
    ) -> FileRecord:
        """Makes a file of an upload. seconds: that it is kept; None: as configured. Raises OSError."""
        now = seconds_now()
        kept = self._seconds_kept() if seconds is None else min(seconds, self._seconds_kept())
        record = FileRecord(
            id=new_file_id(),
            owner=owner,
            bytes=num_bytes,
            created_at=now,
            expires_at=now + kept,
            filename=filename,
            purpose="batch",
        )
        await asyncio.to_thread(self.folder.publish, record, incoming)
        self.folder.files[record.id] = record
        return record

    def file(self, owner: str, file_id: str) -> FileRecord:
        """Raises ApiError 404, also for another owner's."""
        record = self.folder.files.get(file_id)
        if record is None or record.owner != owner or record.expires_at <= seconds_now():
            raise ApiError(404, f"there is no file {file_id[:100]!r}", param="file_id", code="file_not_found")
        return record

    async def delete_file(self, owner: str, file_id: str) -> None:
        record = self.file(owner, file_id)
        if record.id in self._ids_in_use():
            raise ApiError(409, f"file {record.id} is being used by a batch; cancel that first", code="file_in_use")
        del self.folder.files[record.id]
        await asyncio.to_thread(self.folder.remove_file, record.id)

    def list_files(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> Page[FileRecord]:
        now = seconds_now()
        found = [
            record
            for record in self.folder.files.values()
            if record.owner == owner and record.expires_at > now and purpose in (None, record.purpose)
        ]
        return _page(found, FILE_ID, after=after, limit=limit, newest_first=newest_first)

    # Batches

    async def create(
        self, owner: str, *, endpoint: str, input_file_id: str,
        metadata: dict[str, str] | None, output_seconds: int | None,
    ) -> BatchRecord:  # fmt: skip
        """Begins a batch. Raises ApiError: 400 where it can never run, 404 for the file, 429 with too many batches."""
        if endpoint not in self.host.urls:
            known = ", ".join(sorted(self.host.urls))
            raise bad_request(f"endpoint {endpoint[:100]!r} cannot be asked in batches, but {known}", param="endpoint")
        file = self.file(owner, input_file_id)
        if file.purpose != "batch":
            message = f"file {file.id} has the purpose {file.purpose!r}; upload one with the purpose 'batch'"
            raise bad_request(message, param="input_file_id")
        unfinished = sum(r.owner == owner and not r.is_finished for r in self.folder.batches.values())
        if unfinished >= self.config.max_unfinished:
            raise ApiError(
                429,
                f"this API key has {unfinished} unfinished batches, as many as batches.max_unfinished allows; wait for "
                "one, or cancel one",
                code="too_many_batches",
                retry_after=RETRY_SECONDS,
            )
        self._check_num_files(owner, 2 * unfinished)  # each of them may become two
        now = seconds_now()
        record = BatchRecord(
            id=new_batch_id(),
            owner=owner,
            endpoint=endpoint,
            input_file_id=file.id,
            completion_window=WINDOW,
            status="validating",
            output_id=new_file_id(),
            error_id=new_file_id(),
            created_at=now,
            expires_at=now + WINDOW_SECONDS,
            metadata=metadata,
            model=self.host.model_name,
            output_seconds=output_seconds,
        )
        self.folder.batches[record.id] = record  # before anything is awaited: it counts, and its file is in use
        try:
            await asyncio.to_thread(self.folder.save, record)
        except BaseException:
            del self.folder.batches[record.id]
            raise
        self._begin(record)
        await self._forget_oldest(owner)
        return record

    def batch(self, owner: str, batch_id: str) -> BatchRecord:
        """As it is now. Raises ApiError 404, also for another owner's."""
        record = self.folder.batches.get(batch_id)
        if record is None or record.owner != owner:
            raise ApiError(404, f"there is no batch {batch_id[:100]!r}", param="batch_id", code="batch_not_found")
        return self._now(record)

    async def cancel(self, owner: str, batch_id: str) -> BatchRecord:
        record = self.batch(owner, batch_id)
        run = self._runs.get(batch_id)
        if record.is_finished or run is None:
            message = f"batch {record.id} is {record.status} and cannot be cancelled"
            raise ApiError(409, message, code="batch_finished")
        await run.cancel()
        return self.batch(owner, batch_id)

    def list_batches(self, owner: str, *, after: str | None, limit: int) -> Page[BatchRecord]:
        found = [record for record in self.folder.batches.values() if record.owner == owner]
        page = _page(found, BATCH_ID, after=after, limit=limit, newest_first=True)
        return Page([self._now(record) for record in page.records], page.has_more)

    def num_batches(self) -> dict[str, int]:
        """By status."""
        counts: dict[str, int] = dict.fromkeys(STATUSES, 0)
        for record in self.folder.batches.values():
            counts[record.status] += 1
        return counts

    @property
    def num_lines_in_work(self) -> int:
        return self._slots.num_taken

    def num_file_bytes(self) -> int:
        return sum(record.bytes for record in self.folder.files.values())

    # What runs of batches ask: `batch_run.Surroundings`

    @property
    def is_ending(self) -> bool:
        return self.host.is_ending()

    @property
    def max_lines(self) -> int:
        return self.config.max_lines

    @property
    def max_line_bytes(self) -> int:
        return self.host.max_line_bytes

    def dispatcher(self, owner: str) -> InProcess:
        def tenant() -> str | None:
            return self.host.keys.tenant_of_owner(owner, self.folder.secret)

        return InProcess(self.host.app, tenant=tenant, is_ending=self.host.is_ending)

    def seconds_kept(self, record: BatchRecord) -> int:
        return self._seconds_kept() if record.output_seconds is None else record.output_seconds

    async def until_ready(self) -> None:
        await self.host.until_ready()

    def count(self, outcome: str) -> None:
        self.line_counts[outcome] += 1

    async def _forget_oldest(self, owner: str) -> None:
        """Removes records of batches: a key has no more of them than files."""
        own = sorted(record.id for record in self.folder.batches.values() if record.owner == owner)
        for batch_id in own[: max(len(own) - self.config.max_files, 0)]:
            if self.folder.batches[batch_id].is_finished:
                del self.folder.batches[batch_id]
                await asyncio.to_thread(self.folder.remove_batch, batch_id)

    # Tasks

    def _begin(self, record: BatchRecord) -> None:
        run = BatchRun(record, self.folder, self, self._slots, self._turns[record.owner])
        self._runs[record.id] = run
        task = self._tasks[record.id] = asyncio.create_task(run.run())

        def end(task: asyncio.Task[None]) -> None:
            self._tasks.pop(record.id, None)
            self._runs.pop(record.id, None)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("batch %s cannot go on before the next start: %s", record.id, error)

        task.add_done_callback(end)

    def _now(self, record: BatchRecord) -> BatchRecord:
        run = self._runs.get(record.id)
        return run.record if run is not None else record

    def _num_places(self) -> int:
        concurrency = self.config.concurrency
        return 2 * self.host.num_seats() if concurrency == "auto" else concurrency

    def _seconds_kept(self) -> int:
        return int(self.config.keep_days * DAY)

    def _ids_in_use(self) -> set[str]:
        ids: set[str] = set()
        for record in self.folder.batches.values():
            if not record.is_finished:
                ids |= {record.input_file_id, record.output_id, record.error_id}
        return ids

    async def _keep_house(self) -> None:
        """Removes what is older than it may be; to be cancelled."""
        while True:
            with suppress(OSError):  # they are tried again
                await self.remove_old()
            await asyncio.sleep(HOUSEKEEPING_SECONDS)

    async def remove_old(self) -> None:
        now, in_use = seconds_now(), self._ids_in_use()
        for file in list(self.folder.files.values()):
            if file.expires_at <= now and file.id not in in_use:
                await asyncio.to_thread(self.folder.remove_file, file.id)
                self.folder.files.pop(file.id, None)
        for batch in list(self.folder.batches.values()):
            if batch.is_finished and batch.created_at + self._seconds_kept() + WINDOW_SECONDS <= now:
                await asyncio.to_thread(self.folder.remove_batch, batch.id)
                self.folder.batches.pop(batch.id, None)


def _page(
    found: Iterable[RecordT], ids: re.Pattern[str], *, after: str | None, limit: int, newest_first: bool
) -> Page[RecordT]:
    """Ids begin with the time, so `after` may be one that was deleted meanwhile. Raises ApiError 400 if it is none."""
    if after is not None and not ids.fullmatch(after):
        raise bad_request(f"after must be an id of the list, not {after[:100]!r}", param="after")
    ordered = sorted(found, key=lambda record: record.id, reverse=newest_first)
    if after is not None:
        ordered = [record for record in ordered if (record.id < after) == newest_first and record.id != after]
    return Page(ordered[:limit], limit < len(ordered))
