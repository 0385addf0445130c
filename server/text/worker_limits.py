"""The inside of a worker process: the frames that it reads and writes, and the limits that it sets itself.

See `worker_processes` for the outside. Little is imported here, so that a worker starts fast.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

GRACE = 2  # seconds of processor time beyond a limit that the process can see, to its end


def frame(message: msgspec.Struct) -> bytes:
    """The message in MessagePack, behind its length.

    Raises OverflowError for numbers of more than 64 bits, UnicodeEncodeError for lone surrogates.
    """
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(8, "little") + data


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next frame's message, encoded; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "little")
    data = stream.read(size)
    return data if len(data) == size else None


@contextmanager
def limited(max_seconds: float, max_bytes: int, *, grace: int = GRACE) -> Iterator[None]:
    """While it lasts, the process may take so much memory more, and ends after so much processor time and the grace.

    grace: seconds, for a process that sees a limit itself before
    """
    own_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + max_seconds) + 1 + grace)
    _limit(resource.RLIMIT_AS, own_bytes + max_bytes)
    try:
        yield
    finally:
        _limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)


def _limit(kind: int, value: int) -> None:
    """Sets a resource limit of this process, as far as the hard limit that it was started with allows."""
    hard = resource.getrlimit(kind)[1]
    bounds = [bound for bound in (value, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(kind, (min(bounds, default=resource.RLIM_INFINITY), hard))
