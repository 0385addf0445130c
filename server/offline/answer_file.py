"""A file of answers that only grows, a whole line at a time, and that may be continued after any end."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from server.offline.answer_lines import AnswerLine, read_answer

BLOCK = 1 << 16
BEGIN = b'{"id":"batch_req_'
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class AnswerFileError(ValueError):
    """A file that cannot be continued."""


class AnswerFile:
    """The file, open to be continued, and locked: one writer at a time.

    Opening it mends what a kill left: a last line without its end is completed if it is whole, else cut off.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError, and AnswerFileError where it is another one's, or no file of answers."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AnswerFileError(f"{path} is being written by another process; wait for it, or stop it") from None
            self._check_begin()
            self._mend()
            self._size = os.fstat(self._descriptor).st_size
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def answers(self) -> Iterator[AnswerLine]:
        """The lines that are there. Raises AnswerFileError for one that is none."""
        with self.path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                try:
                    yield read_answer(data)
                except ValueError as error:
                    raise AnswerFileError(
                        f"{self.path}: line {number} {error}; name another file for the answers, or mend the line"
                    ) from None

    def append(self, data: bytes) -> None:
        """Adds whole lines: all of them or, where that fails, none. Raises OSError."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)

    def sync(self) -> None:
        """Returns when all of it would survive a loss of power. Raises OSError."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _check_begin(self) -> None:
        """Refuses a file that somebody named by mistake, before anything of it is changed."""
        begin = os.pread(self._descriptor, BLOCK, 0)
        if b"\n" in begin:
            try:
                read_answer(begin.partition(b"\n")[0])
            except ValueError as error:
                raise self._foreign(f"its first line {error}") from None
        elif not BEGIN.startswith(begin[: len(BEGIN)]):  # nor the begin of a first line that was cut off
            raise self._foreign("it has no line that is one")

    def _foreign(self, reason: str) -> AnswerFileError:
        return AnswerFileError(f"{self.path} is there and is no file of answers ({reason}); name another file")

    def _mend(self) -> None:
        """Completes or cuts off a last line without an end."""
        size = os.fstat(self._descriptor).st_size
        if not size or os.pread(self._descriptor, 1, size - 1) == b"\n":
            return
        end = size  # of what is kept
        tail = b""
        while end:
            start = max(end - BLOCK, 0)
            block = os.pread(self._descriptor, end - start, start)
            at = block.rfind(b"\n")
            if at >= 0:
                tail, end = block[at + 1 :] + tail, start + at + 1
                break
            tail, end = block + tail, start
        try:
            read_answer(tail)
        except ValueError:
            os.ftruncate(self._descriptor, end)
        else:
            os.write(self._descriptor, b"\n")


def is_full(error: OSError) -> bool:
    """Whether there is no room, rather than something wrong."""
    return error.errno in FULL
