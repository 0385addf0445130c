"""File descriptors that are kept free for another engine process, where clients' connections take all others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

NUM_DESCRIPTORS = 12  # a socket pair, two pipes, the crash note three times, /dev/null, and two to spare


class DescriptorReserve:
    """Holds descriptors open that it can give up at any time: nobody else can have taken them meanwhile."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []

    def fill(self) -> None:
        """Takes what it lacks, or what there is."""
        with contextlib.suppress(OSError):
            while len(self._descriptors) < NUM_DESCRIPTORS:
                self._descriptors.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def release(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """They are free within, for code that does not give the loop a turn, and taken back after."""
        self.release()
        try:
            yield
        finally:
            self.fill()
