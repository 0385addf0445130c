"""HTTP/1.1 under httpx, with the arrival time of every piece of a body.

httpx's own transport spends 100 to 300 us on a piece that arrives alone (h11, anyio, two more turns of the event loop),
and the time is known only after all that. Here httptools parses inside the socket's callback, which also reads the
clock, and the pieces go to a function of the caller's: no task wakes up until the body is complete.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import cast

import httptools
import httpx

Sink = Callable[[float, bytes], None]  # (time.perf_counter() of the arrival, piece of the body)

MAX_IDLE_SECONDS = 2.0  # servers close idle connections after 5 s or more: a reused one must not meet that moment


class Connection(asyncio.Protocol):
    """One connection, one response at a time. Also the object that httptools calls back."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self.idle_since = 0.0
        self.begin()

    def begin(self) -> None:
        """Makes ready for the next response."""
        self._parser = httptools.HttpResponseParser(self)
        self.headers: list[tuple[bytes, bytes]] = []
        self.head: asyncio.Future[int] = self._loop.create_future()
        self.complete: asyncio.Future[None] = self._loop.create_future()
        for future in (self.head, self.complete):
            future.add_done_callback(_look_at)
        self._early: list[tuple[float, bytes]] = []
        self._sink: Sink | None = None
        self._may_follow = False
        self._now = 0.0

    def send(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def set_sink(self, sink: Sink) -> None:
        """Hands over what has come, and from here on each piece at its arrival."""
        for received_at, piece in self._early:
            sink(received_at, piece)
        self._early.clear()
        self._sink = sink

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    @property
    def is_reusable(self) -> bool:
        """Whether the response is complete and another request may follow."""
        return self._may_follow and not self.lost.done()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(httpx.RemoteProtocolError(f"not HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self.head.done() and not self.complete.done() and self._ends_at_close():
            self.complete.set_result(None)
        self._fail(httpx.RemoteProtocolError(f"connection closed before the end of the response ({error or 'EOF'})"))
        if not self.lost.done():
            self.lost.set_result(None)

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.head.set_result(self._parser.get_status_code())

    def on_body(self, piece: bytes) -> None:
        if self._sink is None:
            self._early.append((self._now, piece))
        else:
            self._sink(self._now, piece)

    def on_message_complete(self) -> None:
        self._may_follow = self._parser.should_keep_alive()  # the parser forgets it after this
        if not self.complete.done():
            self.complete.set_result(None)

    def _ends_at_close(self) -> bool:
        names = {name.lower() for name, _ in self.headers}
        return not names & {b"content-length", b"transfer-encoding"}

    def _fail(self, error: Exception) -> None:
        for future in (self.head, self.complete):
            if not future.done():
                future.set_exception(error)


class TimedBody(httpx.AsyncByteStream):
    """The body of a response. `deliver` gives it with times; reading it as any httpx body works too."""

    def __init__(self, connection: Connection, release: Callable[[Connection], None]) -> None:
        self._connection = connection
        self._release = release
        self._is_open = True

    async def deliver(self, sink: Sink) -> None:
        """Calls `sink` with each piece at its arrival and returns after the last one.

        Raises httpx.RemoteProtocolError if the connection ends before the body does.
        """
        self._connection.set_sink(sink)
        await asyncio.shield(self._connection.complete)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces: list[bytes] = []
        await self.deliver(lambda _, piece: pieces.append(piece))
        yield b"".join(pieces)

    async def aclose(self) -> None:
        if self._is_open:
            self._is_open = False
            self._release(self._connection)


class TimedTransport(httpx.AsyncBaseTransport):
    """Responses carry their `TimedBody` in `extensions["body"]`.

    keeps_alive: use connections again. A server that closes one at the moment of its reuse, as llama-server does after
    a stream, then looks as if it had dropped the request.
    """

    def __init__(self, *, keeps_alive: bool) -> None:
        self._keeps_alive = keeps_alive
        self._idle: defaultdict[tuple[str, int], list[Connection]] = defaultdict(list)
        self._all: set[Connection] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends the request and returns when the response's headers have come. httpx's connect timeout is honoured."""
        connection = await self._connection(request)
        origin = _origin(request)

        def release(connection: Connection) -> None:
            if self._keeps_alive and connection.is_reusable:
                connection.idle_since = time.perf_counter()
                self._idle[origin].append(connection)
            else:
                connection.close()

        connection.begin()
        connection.send(_encode(request, await request.aread()))
        try:
            status = await asyncio.shield(connection.head)
        except BaseException:
            connection.close()
            raise
        body = TimedBody(connection, release)
        return httpx.Response(status, headers=connection.headers, stream=body, extensions={"body": body})

    async def aclose(self) -> None:
        for connection in self._all:
            connection.close()
        if self._all:
            await asyncio.wait([connection.lost for connection in self._all])

    async def _connection(self, request: httpx.Request) -> Connection:
        idle = self._idle[_origin(request)]
        while idle:
            connection = idle.pop()
            if not connection.lost.done() and time.perf_counter() - connection.idle_since < MAX_IDLE_SECONDS:
                return connection
            connection.close()
        return await self._connect(request)

    async def _connect(self, request: httpx.Request) -> Connection:
        host, port = _origin(request)
        context = ssl.create_default_context() if request.url.scheme == "https" else None
        try:
            async with asyncio.timeout(request.extensions.get("timeout", {}).get("connect")):
                _, connection = await asyncio.get_running_loop().create_connection(Connection, host, port, ssl=context)
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"no connection to {host}:{port} in time", request=request) from error
        except OSError as error:
            raise httpx.ConnectError(f"{host}:{port}: {error}", request=request) from error
        self._all.add(connection)
        connection.lost.add_done_callback(lambda _: self._all.discard(connection))
        return connection


def _origin(request: httpx.Request) -> tuple[str, int]:
    return request.url.host, request.url.port or (443 if request.url.scheme == "https" else 80)


def _encode(request: httpx.Request, body: bytes) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % header for header in request.headers.raw]
    return b"\r\n".join([*lines, b"", body])


def _look_at(future: asyncio.Future[int] | asyncio.Future[None]) -> None:
    """Marks an exception as seen: a connection that breaks while nobody waits for it is no event to report."""
    if not future.cancelled():
        future.exception()
