"""The middleware that reads request bodies: on demand, decompressed, with a limit for each and a budget for all."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.config import Config
from server.errors import ApiError, bad_request, error_response

UPLOAD = ("POST", "/v1/files")  # whose body goes to the disk as it comes
FORM_BYTES = 65536  # of a form around a file
PIECE = 262144  # bytes that are decompressed before others have a turn: about a millisecond
ACCEPTED_CODINGS = "gzip, deflate"


class BodyBudget:
    """The bytes that all bodies together may have in memory, each from its first byte until it is parsed."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._reads: set[asyncio.Timeout] = set()
        self._is_closed = False

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def take(self, num_bytes: int, *, already: int) -> None:
        """Takes bytes for a body that has `already` some. Raises ApiError 503 if other bodies leave no room."""
        others = self._num_bytes - already
        if others and self._num_bytes + num_bytes > self._max_bytes:
            message = (
                f"bodies of {self._num_bytes} bytes are being read, and all of them together may have "
                f"operation.max_total_body_bytes ({self._max_bytes}); try again"
            )
            raise ApiError(503, message, code="overloaded")
        self._num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes

    def close(self) -> None:
        """Makes all reads of bodies time out, and refuses new ones: the server ends."""
        self._is_closed = True
        for read in self._reads:
            if not read.expired():
                read.reschedule(0)

    @contextmanager
    def reading(self, timeout: asyncio.Timeout) -> Iterator[None]:
        """A context around the reading of one body, whose `timeout` expires at once if the server ends."""
        self.refuse_if_closed()
        self._reads.add(timeout)
        try:
            yield
        finally:
            self._reads.discard(timeout)

    def refuse_if_closed(self) -> None:
        if self._is_closed:
            raise ApiError(503, "the server is shutting down and reads no more requests", code="draining")


class BodyReader:
    """Middleware: the application receives a body whole, when it asks for it, or an ApiError."""

    def __init__(self, app: ASGIApp, *, config: Config, budget: BodyBudget) -> None:
        self._app = app
        self._config = config
        self._budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = self._config.batches.folder is not None and (scope["method"], scope["path"]) == UPLOAD
        kind = StreamedBody if is_upload else IncomingBody
        body = kind(scope, receive, config=self._config, budget=self._budget)
        try:
            body.check_declared()
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return

        async def send_with_advice(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if body.is_late:
                    headers.append((b"connection", b"close"))
                if message["status"] == 415:
                    headers.append((b"accept-encoding", ACCEPTED_CODINGS.encode()))
                message["headers"] = headers
            await send(message)

        try:
            await self._app(scope, body.receive, send_with_advice)
        finally:
            body.release()


class IncomingBody:
    """The body of one request. It counts towards the budget until the application asks for what comes after it."""

    def __init__(self, scope: Scope, receive: Receive, *, config: Config, budget: BodyBudget) -> None:
        self._scope = scope
        self._receive = receive
        self._max_bytes, self._limit = config.limits.max_body_bytes, "limits.max_body_bytes"
        self._timeout = config.operation.body_timeout
        self._budget = budget
        self._is_read = False
        self._num_received = 0
        self._num_held = 0
        self.is_late = False  # it timed out

    def check_declared(self) -> None:
        """Raises ApiError 413 for a length that would not be read to its end."""
        declared = self._header(b"content-length")
        if declared.isdigit() and int(declared) > self._max_bytes:
            raise self._too_large(int(declared))

    async def receive(self) -> Message:
        """Raises ApiError: 400 for what cannot be decompressed, 408, 413, 415, 503."""
        if self._is_read:
            self.release()
            return await self._receive()
        self._is_read = True
        decoding = _decoding(self._header(b"content-encoding"))
        try:
            async with asyncio.timeout(self._timeout) as timeout:
                with self._budget.reading(timeout):
                    return await self._read(decoding)
        except TimeoutError:
            self.is_late = True
            self._budget.refuse_if_closed()
            message = (
                f"the body was not complete within {self._timeout:g} s (operation.body_timeout), "
                f"{self._num_received} bytes of it came; send it faster, or less"
            )
            raise ApiError(408, message, code="request_timeout") from None

    def release(self) -> None:
        self._budget.give_back(self._num_held)
        self._num_held = 0

    async def _read(self, decoding: Decompression | None) -> Message:
        kept: list[bytes] = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return message
            data = message.get("body", b"")
            self._num_received += len(data)
            if self._num_received > self._max_bytes:
                raise self._too_large(self._num_received)
            if decoding is None:
                self._keep(data, kept)
            else:
                for piece in decoding.pieces(data):
                    self._keep(piece, kept)
                    await asyncio.sleep(0)
            if not message.get("more_body", False):
                break
        if decoding is not None:
            decoding.finish()
        return {"type": "http.request", "body": b"".join(kept), "more_body": False}

    def _keep(self, data: bytes, kept: list[bytes]) -> None:
        if self._num_held + len(data) > self._max_bytes:
            raise self._too_large(self._num_held + len(data))
        self._budget.take(len(data), already=self._num_held)
        self._num_held += len(data)
        kept.append(data)

    def _header(self, name: bytes) -> bytes:
        return b",".join(value for each, value in self._scope["headers"] if each == name).strip().lower()

    def _too_large(self, num_bytes: int) -> ApiError:
        return ApiError(
            413,
            f"the body has {num_bytes} bytes or more, but {self._limit} allows {self._max_bytes}; "
            "send less, or raise the limit",
        )


class StreamedBody(IncomingBody):
    """The body of an upload, which is handed on in pieces: little of it is in memory, so it may be as long as a file.

    Each piece has the time that other bodies have for all of theirs.
    """

    def __init__(self, scope: Scope, receive: Receive, *, config: Config, budget: BodyBudget) -> None:
        super().__init__(scope, receive, config=config, budget=budget)
        self._max_bytes, self._limit = config.batches.max_file_bytes + FORM_BYTES, "batches.max_file_bytes"
        self._decoding: Decompression | None = None
        self._has_begun = False
        self._pieces: Iterator[bytes] = iter(())
        self._num_decoded = 0
        self._is_last = False

    async def receive(self) -> Message:
        """Raises ApiError: 400 for what cannot be decompressed, 408, 413, 415, 503."""
        if self._is_read:
            return await self._receive()
        if not self._has_begun:
            self._has_begun = True
            self._decoding = _decoding(self._header(b"content-encoding"))
        piece = next(self._pieces, None)
        while piece is None and not self._is_last:
            message = await self._next_message()
            if message["type"] == "http.disconnect":
                return message
            data = message.get("body", b"")
            self._num_received += len(data)
            self._is_last = not message.get("more_body", False)
            self._pieces = iter((data,)) if self._decoding is None else self._decoding.pieces(data)
            piece = next(self._pieces, None)
        if piece is None:  # the last ones are out
            if self._decoding is not None:
                self._decoding.finish()
            self._is_read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        self._num_decoded += len(piece)
        if max(self._num_decoded, self._num_received) > self._max_bytes:
            raise self._too_large(max(self._num_decoded, self._num_received))
        return {"type": "http.request", "body": piece, "more_body": True}

    async def _next_message(self) -> Message:
        try:
            async with asyncio.timeout(self._timeout) as timeout:
                with self._budget.reading(timeout):
                    return await self._receive()
        except TimeoutError:
            self.is_late = True
            self._budget.refuse_if_closed()
            message = (
                f"nothing of the upload came for {self._timeout:g} s (operation.body_timeout), {self._num_received} "
                "bytes of it were there; send it faster"
            )
            raise ApiError(408, message, code="request_timeout") from None


class Decompression:
    """A body in one of gzip's or deflate's formats (RFC 1952; RFC 1950, and RFC 1951 as some clients understand it)."""

    def __init__(self, *, is_gzip: bool) -> None:
        self._decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS) if is_gzip else None
        self._start = b""  # of a deflate body, until it shows whether it has zlib's header

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Decompresses the next bytes, and yields at most PIECE bytes at a time. Raises ApiError 400."""
        if self._decoder is None:
            data = self._start = self._start + data
            if len(data) < 2:
                return
            has_header = data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0
            self._decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
        is_full = False
        while data or is_full:
            if self._decoder.eof:
                raise bad_request("the compressed body goes on after its end; send one compressed stream")
            try:
                piece = self._decoder.decompress(data, PIECE)
            except zlib.error as error:
                raise bad_request(f"the body is not what its Content-Encoding says: {error}") from None
            is_full = len(piece) == PIECE and not self._decoder.eof
            data = self._decoder.unused_data or self._decoder.unconsumed_tail
            yield piece

    def finish(self) -> None:
        """Checks that the compressed stream is complete. Raises ApiError 400."""
        if self._decoder is None or not self._decoder.eof:
            raise bad_request("the compressed body ends in the middle; send all of it")


def _decoding(coding: bytes) -> Decompression | None:
    """The decompression for a Content-Encoding; None for none. Raises ApiError 415."""
    if coding in (b"", b"identity"):
        return None
    if coding not in (b"gzip", b"x-gzip", b"deflate"):
        shown = coding[:100].decode("latin-1")
        message = f"the Content-Encoding {shown!r} is not read; send the body as it is, or as one of {ACCEPTED_CODINGS}"
        raise ApiError(415, message, code="unsupported_content_encoding")
    return Decompression(is_gzip=coding != b"deflate")
