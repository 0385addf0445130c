"""HTTP/1.1 with the arrival time of every piece of a body.

General clients spend 100 to 300 us on a piece that arrives alone (a parser in Python, two more turns of the event
loop), and the time is known only after all that. Here httptools parses inside the socket's callback, which also
reads the clock, and the pieces go to a function of the caller's: no task wakes up until the body is complete.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import cast
from urllib.parse import urlsplit

import httptools

Sink = Callable[[float, bytes], None]  # (time.perf_counter() of the arrival, piece of the body)
Headers = Mapping[bytes, bytes]  # their names in small letters
OnHead = Callable[[int, Headers], Sink]  # (status, headers) -> what takes the body

MAX_IDLE_SECONDS = 2.0  # servers close idle connections after 5 s or more: a reused one must not meet that moment


class ResponseError(Exception):
    """The connection broke before the response was whole, or what came was not HTTP."""


class Connection(asyncio.Protocol):
    """One connection, one response at a time. Also the object that httptools calls back."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.is_reusable = False  # the response is complete, and another request may follow
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._complete: asyncio.Future[None] = loop.create_future()

    async def exchange(self, request: bytes, on_head: OnHead) -> None:
        """Sends a request. `on_head` says who gets each piece of the body at its arrival; returns after the last.

        Raises ResponseError if the connection ends before the body does.
        """
        assert self._transport is not None
        if self.lost.done():
            raise ResponseError("the connection was closed")
        self.is_reusable = False
        self._complete = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._on_head = on_head
        self._headers: dict[bytes, bytes] = {}
        self._sink: Sink | None = None
        self._transport.write(request)
        await self._complete

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ResponseError(f"not HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        broken = ResponseError(f"connection closed before the end of the response ({error or 'EOF'})")
        if not self._complete.done():
            has_length = self._headers.keys() & {b"content-length", b"transfer-encoding"}
            self._end(broken if self._sink is None or has_length else None)
        self.lost.set_result(None)

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._sink = self._on_head(self._parser.get_status_code(), self._headers)

    def on_body(self, piece: bytes) -> None:
        assert self._sink is not None
        self._sink(self._now, piece)

    def on_message_complete(self) -> None:
        self.is_reusable = self._parser.should_keep_alive()  # the parser forgets it after this
        self._end(None)

    def _end(self, error: ResponseError | None) -> None:
        if self._complete.done():
            return
        if error is None:
            self._complete.set_result(None)
        else:
            self._complete.set_exception(error)


class Connections:
    """Those to one server.

    keeps_alive: use them again. A server that closes one at the moment of its reuse, as llama-server does after a
    stream, then looks as if it had dropped the request.
    """

    def __init__(self, url: str, *, keeps_alive: bool) -> None:
        parts = urlsplit(url)
        self._is_encrypted = parts.scheme == "https"
        self._origin = parts.hostname or "", parts.port or (443 if self._is_encrypted else 80)
        self._keeps_alive = keeps_alive
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Connection]:
        """A connection for one exchange. Raises OSError if none can be made."""
        connection = self._take_idle() or await self._connect()
        try:
            yield connection
        finally:
            if self._keeps_alive and connection.is_reusable:
                connection.idle_since = time.perf_counter()
                self._idle.append(connection)
            else:
                connection.close()

    async def close(self) -> None:
        for connection in self._all:
            connection.close()
        if self._all:
            await asyncio.wait([connection.lost for connection in self._all])

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost.done() and time.perf_counter() - connection.idle_since < MAX_IDLE_SECONDS:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        context = ssl.create_default_context() if self._is_encrypted else None
        _, connection = await asyncio.get_running_loop().create_connection(Connection, *self._origin, ssl=context)
        self._all.add(connection)
        connection.lost.add_done_callback(lambda _: self._all.discard(connection))
        return connection
