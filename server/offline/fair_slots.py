"""Places for lines in work: bounded in number and in bytes, and given to owners in turn."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

MAX_BYTES = 1 << 26  # of the lines in work together; a larger one is in work alone

_Waiter = tuple[asyncio.Future[None], int]


class FairSlots:
    """Places of one event loop. Whoever waits gets the next one when its owner's turn has come: an owner with a
    thousand files waits behind itself."""

    def __init__(self, capacity: Callable[[], int], *, max_bytes: int = MAX_BYTES) -> None:
        """capacity: how many there are now; it may change"""
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._num_taken = 0
        self._num_bytes = 0
        self._queues: dict[str, deque[_Waiter]] = {}  # by owner; whose turn is next comes first

    @property
    def num_taken(self) -> int:
        return self._num_taken

    async def take(self, owner: str, num_bytes: int) -> None:
        """Waits for a place."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(owner, deque()).append((waiter, num_bytes))
        self._serve()
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # it has come meanwhile
                self.give_back(num_bytes)
            raise

    def give_back(self, num_bytes: int) -> None:
        self._num_taken -= 1
        self._num_bytes -= num_bytes
        self._serve()

    def _serve(self) -> None:
        while self._queues:
            owner, queue = next(iter(self._queues.items()))
            waiter, num_bytes = queue[0]
            if waiter.cancelled():
                queue.popleft()
            elif self._has_room(num_bytes):
                queue.popleft()
                self._num_taken += 1
                self._num_bytes += num_bytes
                waiter.set_result(None)
                self._queues[owner] = self._queues.pop(owner)
            else:
                return
            if not queue:
                del self._queues[owner]

    def _has_room(self, num_bytes: int) -> bool:
        if not self._num_taken:
            return True
        return self._num_taken < self._capacity() and self._num_bytes + num_bytes <= self._max_bytes
