"""Threads that work on pieces of one matrix while a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")
P = TypeVar("P")


class Threads:
    """Some threads, in each of which torch has one: those that it would start inside of each would wait for others.

    They start with the first work that is for several. `close` ends them, and more work starts them again.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None

    def map(self, work: Callable[[P], T], pieces: Iterable[P]) -> list[T]:
        """Of each piece, in order. `work` should hold no interpreter lock."""
        pieces = list(pieces)
        if self.num_threads == 1 or len(pieces) == 1:
            return [work(piece) for piece in pieces]
        if self._pool is None:
            self._pool = self._start()
        return list(self._pool.map(work, pieces))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _start(self) -> ThreadPoolExecutor:
        num_before, barrier = torch.get_num_threads(), Barrier(self.num_threads)
        pool = ThreadPoolExecutor(self.num_threads, initializer=torch.set_num_threads, initargs=(1,))
        list(pool.map(lambda _: barrier.wait(), range(self.num_threads)))  # all have started
        torch.set_num_threads(num_before)  # of threads to come: what one sets is its own and theirs
        return pool

    def step(self, total: int, most: int) -> int:
        """The size of pieces of `total` things, up to `most`, so that there are as many pieces for each thread."""
        rounds = max(1, -(-total // (most * self.num_threads)))
        return max(1, -(-total // (rounds * self.num_threads)))
