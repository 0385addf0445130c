"""A reserve of file descriptors, with which an engine process can be started while connections use up all others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

NUM_DESCRIPTORS = 12  # a socket pair, two pipes, the in-flight record three times, /dev/null, and two to spare


class DescriptorReserve:
    """Holds descriptors open, and closes them for a moment when a process is started."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []

    def fill(self) -> None:
        """Opens descriptors up to the full number, as far as the system has any."""
        with contextlib.suppress(OSError):
            while len(self._descriptors) < NUM_DESCRIPTORS:
                self._descriptors.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def release(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """A context in which the descriptors are free. It must not await, or a connection could take them."""
        self.release()
        try:
            yield
        finally:
            self.fill()
