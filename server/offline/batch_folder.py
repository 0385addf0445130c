"""The folder of a server's files and batches. Everything in it is written atomically, and read again at a start.

    lock          held by the server that uses the folder
    secret        of which the owners' names are made
    files/        ID.jsonl, and ID.json, which makes a file of it: FileRecord
    batches/      ID.json: BatchRecord
    incoming/     uploads until they are whole

Calls that touch the disk may block, and are made in threads; what is in memory belongs to the event loop.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from server.offline.records import BatchRecord, FileRecord

logger = logging.getLogger("peregrine.server")
RecordT = TypeVar("RecordT", FileRecord, BatchRecord)

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{24}")
INCOMING = re.compile(r"[0-9a-f]{24}")
SECRET_BYTES = 32


class BatchFolderError(ValueError):
    """A folder that cannot be used."""


class BatchFolder:
    """The folder, locked for this process, and what is in it. Raises BatchFolderError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            for name in ("files", "batches", "incoming"):
                (path / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._take_lock()
            self.secret = self._read_secret()
            self.files = {record.id: record for record in self._load("files", FILE_ID, FileRecord)}
            self.batches = {record.id: record for record in self._load("batches", BATCH_ID, BatchRecord)}
            self._sweep()
        except OSError as error:
            raise BatchFolderError(
                f"batches.folder {path} cannot be used: {error.strerror or error}; name a folder that this user may "
                "write to"
            ) from None

    def close(self) -> None:
        os.close(self._lock)

    # Files

    def data_path(self, file_id: str) -> Path:
        """Where the content of a file is. The id must be one that `new_file_id` made."""
        assert FILE_ID.fullmatch(file_id), "an id from outside must be looked up in `files` first"
        return self.path / "files" / f"{file_id}.jsonl"

    def new_incoming(self) -> Path:
        return self.path / "incoming" / secrets.token_hex(12)

    def publish(self, record: FileRecord, incoming: Path | None = None) -> None:
        """Makes a file of what is at `data_path`, or was uploaded to `incoming`. Blocks; raises OSError."""
        target = self.data_path(record.id)
        if incoming is not None:
            os.replace(incoming, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
        _write(self._record_path("files", record.id), msgspec.json.encode(record))

    def remove_file(self, file_id: str) -> None:
        """Blocks."""
        for path in (self._record_path("files", file_id), self.data_path(file_id)):
            path.unlink(missing_ok=True)

    # Batches

    def save(self, record: BatchRecord) -> None:
        """Blocks; raises OSError."""
        _write(self._record_path("batches", record.id), msgspec.json.encode(record))

    def remove_batch(self, batch_id: str) -> None:
        """Blocks."""
        self._record_path("batches", batch_id).unlink(missing_ok=True)

    def _record_path(self, room: str, name: str) -> Path:
        return self.path / room / f"{name}.json"

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchFolderError(
                f"batches.folder {self.path} is in use by another server; give each server a folder of its own"
            ) from None

    def _read_secret(self) -> bytes:
        path = self.path / "secret"
        with contextlib.suppress(FileNotFoundError):
            secret = path.read_bytes()
            if len(secret) == SECRET_BYTES:
                return secret
            raise BatchFolderError(f"{path} is damaged; put back what it was, or use another folder")
        _write(path, secret := secrets.token_bytes(SECRET_BYTES))
        return secret

    def _load(self, room: str, ids: re.Pattern[str], kind: type[RecordT]) -> Iterator[RecordT]:
        for path in sorted((self.path / room).glob("*.json")):
            if not ids.fullmatch(path.stem):
                continue
            try:
                record = msgspec.json.decode(path.read_bytes(), type=kind)
            except (OSError, msgspec.MsgspecError) as error:
                logger.error("%s is left out: it cannot be read: %s", path, error)
                continue
            if record.id == path.stem:
                yield record

    def _sweep(self) -> None:
        """Removes what a kill has left: uploads that were not whole, and contents without a record."""
        kept = set(self.files)
        for batch in self.batches.values():
            if not batch.is_finished:
                kept |= {batch.output_id, batch.error_id}
        for path in (self.path / "incoming").iterdir():
            if INCOMING.fullmatch(path.name):  # the folder may hold what is not ours
                path.unlink(missing_ok=True)
        for path in (self.path / "files").glob("file-*.jsonl"):
            has_record = path.with_suffix(".json").exists()  # which may just be unreadable
            if FILE_ID.fullmatch(path.stem) and path.stem not in kept and not has_record:
                path.unlink(missing_ok=True)
        for record in list(self.files.values()):
            if not self.data_path(record.id).is_file():
                logger.error("file %s is gone: its content is not there", record.id)
                self.remove_file(record.id)
                del self.files[record.id]


def new_file_id() -> str:
    return f"file-{_number()}"


def new_batch_id() -> str:
    return f"batch_{_number()}"


def _number() -> str:
    """24 hexadecimal digits, in the order of the time."""
    return f"{time.time_ns():016x}{secrets.token_hex(4)}"


def seconds_now() -> int:
    """Since 1970."""
    return int(time.time())


def _write(path: Path, data: bytes) -> None:
    """Writes a file that has either its old content or its new one, whatever happens. Raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
