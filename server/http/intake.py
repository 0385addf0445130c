"""Backpressure on connections: bounds on their number, and on the memory of all their unfinished heads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import Protocol

logger = logging.getLogger("peregrine.server")

SECONDS_BETWEEN_WARNINGS = 60.0


class Connection(Protocol):
    """The interface of a connection to the intake."""

    def make_room(self) -> None:
        """Called to evict the connection: closes it, or drops what it holds."""
        ...

    def read_on(self) -> None:
        """Reads some of what it left unread."""
        ...


class Intake:
    """The open connections of one server. At a limit, the connection that has waited longest is evicted.

    A request that is sent at once waits for microseconds, so eviction hits idle connections, and requests that arrive
    a byte at a time.
    """

    def __init__(self, *, max_connections: int, max_held_bytes: int) -> None:
        self._max_connections = max_connections
        self._max_held_bytes = max_held_bytes
        self._open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # without a request that is being answered; the oldest first
        self._held: dict[Connection, int] = {}  # bytes of unfinished or unread heads; the oldest first
        self._num_held_bytes = 0
        self._backlog: deque[Connection] = deque()
        self._is_reading = False
        self._num_evicted = 0
        self._warned_at = float("-inf")

    @property
    def num_connections(self) -> int:
        return len(self._open)

    @property
    def num_held_bytes(self) -> int:
        return self._num_held_bytes

    def connect(self, connection: Connection) -> bool:
        """Takes a new connection in. False if every place is taken by a request that is being answered."""
        while len(self._open) >= self._max_connections:
            oldest = next(iter(self._waiting), None)
            if oldest is None:
                return False
            self._evict(oldest, f"operation.max_connections ({self._max_connections})")
            self.leave(oldest)
        self._open.add(connection)
        self._waiting[connection] = None
        return True

    def wait(self, connection: Connection) -> None:
        """Notes that the connection has no request that is being answered, and may be evicted."""
        if connection in self._open:
            self._waiting[connection] = None

    def work(self, connection: Connection) -> None:
        """Notes that a request of the connection is being answered; until then it is not evicted for its place."""
        self._waiting.pop(connection, None)

    def hold(self, connection: Connection, num_bytes: int) -> None:
        """Notes how many bytes the connection holds now. May evict any connection, this one included."""
        self._num_held_bytes += num_bytes - self._held.get(connection, 0)
        if num_bytes:
            self._held[connection] = num_bytes  # keeps its place in the order
        else:
            self._held.pop(connection, None)
        while self._num_held_bytes > self._max_held_bytes:
            oldest = next(iter(self._held))
            self._num_held_bytes -= self._held.pop(oldest)
            self._evict(oldest, f"operation.max_total_head_bytes ({self._max_held_bytes})")

    def read_later(self, connection: Connection) -> None:
        """Queues the connection to read on. One of the queue does so in each iteration of the event loop."""
        self._backlog.append(connection)
        if not self._is_reading:
            self._is_reading = True
            asyncio.get_running_loop().call_soon(self._read_one)

    def leave(self, connection: Connection) -> None:
        """Forgets a connection that is closed, or about to be."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)
        self._num_held_bytes -= self._held.pop(connection, 0)

    def _read_one(self) -> None:
        self._backlog.popleft().read_on()
        self._is_reading = bool(self._backlog)
        if self._is_reading:
            asyncio.get_running_loop().call_soon(self._read_one)

    def _evict(self, connection: Connection, limit: str) -> None:
        connection.make_room()
        self._num_evicted += 1
        now = time.monotonic()
        if now - self._warned_at >= SECONDS_BETWEEN_WARNINGS:
            self._warned_at = now
            logger.warning("connections are closed to make room: %s is reached (%d so far)", limit, self._num_evicted)
