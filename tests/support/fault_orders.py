"""Faults on order, for engines and servers in processes of their own: a file in a folder is an order.

The folder is named by the environment variable PEREGRINE_FAULTS, which both processes of a server inherit. Whoever
obeys an order takes the file away first, so that the process that follows does not obey it again.

hang: the step never ends, while the process gives signs of life: a device that never answers
circle: steps compute nothing from now on
memory: the text says how many steps in a row run out of memory
error: the step raises
clock: the text says by how many seconds the wall clock jumps; for good, so the file stays
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

VARIABLE = "PEREGRINE_FAULTS"
POLL = 0.05  # seconds


class FaultOrders:
    def __init__(self, folder: Path | None) -> None:
        """None: there never are any"""
        self._folder = folder
        self.goes_in_circles = False
        self._num_failing_allocations = 0

    @classmethod
    def from_environment(cls) -> FaultOrders:
        folder = os.environ.get(VARIABLE)
        return cls(None if folder is None else Path(folder))

    def obey(self) -> None:
        """Called in each step, before anything is computed."""
        if self._folder is None:
            return
        if self._take("hang") is not None:
            time.sleep(1e6)
        if self._take("circle") is not None:
            self.goes_in_circles = True
        if (number := self._take("memory")) is not None:
            self._num_failing_allocations = int(number)
        if self._num_failing_allocations:
            self._num_failing_allocations -= 1
            raise MemoryError("the device has no memory left, on order")
        if self._take("error") is not None:
            raise RuntimeError("a step failed, on order")

    def _take(self, name: str) -> str | None:
        assert self._folder is not None
        file = self._folder / name
        if not file.exists():
            return None
        text = file.read_text()
        file.unlink()
        return text

    def follow_clock(self) -> None:
        """Makes the wall clock of this process, as Python programs read it, jump when that is ordered."""
        if self._folder is None:
            return
        file, offset = self._folder / "clock", [0.0]
        real, real_ns = time.time, time.time_ns

        def watch() -> None:
            while True:
                if file.exists():
                    offset[0] = float(file.read_text() or 0.0)
                time.sleep(POLL)

        time.time = lambda: real() + offset[0]
        time.time_ns = lambda: real_ns() + int(offset[0] * 1e9)
        threading.Thread(target=watch, daemon=True).start()
