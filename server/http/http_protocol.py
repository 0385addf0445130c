"""The HTTP/1.1 protocol of a connection: uvicorn's, with bounds before authorisation, and JSON errors for bad HTTP."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from enum import Enum, auto
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.config import Config
from server.errors import ApiError, bad_request, error_body, error_headers
from server.http.intake import Intake

if TYPE_CHECKING:
    import uvicorn
    from uvicorn._types import ASGISendEvent
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
    from uvicorn.server import ServerState

MAX_HEADERS = 128  # each costs far more than its bytes
HEADER_COST = 256  # bytes of memory: a tuple, two strings and their place in a list
MAX_LINES = (
    MAX_HEADERS + 8
)  # with the request line, the empty one at the end, and some that careless clients send before
CHUNKED_PIECE = 4096  # bytes of a chunked body that the parser sees at once
MAX_CALLS = 512  # of the parser's, for chunks and trailers, before other connections have a turn
MAX_FRAMING_PER_BYTE = 8  # of a chunked body: chunks of one byte have five around it
LINGER = 5.0  # seconds that the last bytes of a closed connection get to leave
HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]*")


class Phase(Enum):
    """The state of a connection, as that of the request that it reads."""

    IDLE = auto()  # no byte of the next request has arrived
    HEAD = auto()  # the request line and headers are arriving
    BODY = auto()  # the body is arriving; the request may have been answered already
    ANSWER = auto()  # the request is complete, and is being answered
    CLOSING = auto()  # the connection is closing; what arrives is dropped


class HttpProtocol(HttpToolsProtocol):
    """The protocol of one connection, called by the event loop, by the parser and by the task that answers.

    Bytes are counted before the parser keeps them, and handed to it in pieces that end where a request may end: while
    a request is answered, the ones behind it stay unread.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        settings: Config,
        intake: Intake,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser = self._make_parser()
        self._operation = settings.operation
        self._max_drained_bytes = 2 * settings.limits.max_body_bytes
        self._intake = intake
        self._phase = Phase.IDLE
        self._unread = b""  # while a request is answered: what came behind it
        self._has_stopped_reading = False  # of this connection, for good
        self._refusal: ApiError | None = None  # why the parser was stopped
        self._num_head_bytes = 0
        self._num_head_lines = 0
        self._num_calls = 0  # of the parser's, in this turn of the event loop
        self._num_body_bytes = 0
        self._num_framing_bytes = 0  # of a body: sizes and extensions of chunks, trailers
        self._num_drained_bytes = 0  # of a body that came after its answer
        self._num_bytes_left: int | None = None  # of a body with Content-Length; None: it is chunked
        self._timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    # What the event loop calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._intake.connect(self):
            self._arm(self._operation.head_timeout, self._on_head_timeout)
            return
        message = (
            f"{self._operation.max_connections} connections are open and busy (operation.max_connections); try again"
        )
        self._refuse(ApiError(503, message, code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._intake.leave(self)
        self._phase = Phase.CLOSING
        self._disarm()
        self._cancel_send_timer()
        self._unread = b""
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._unread:
            data, self._unread = self._unread + data, b""
        start = self._num_calls = 0
        while start < len(data) and self._phase is not Phase.CLOSING and not self._has_stopped_reading:
            if self._phase is Phase.ANSWER:
                self._leave_unread(data[start:])
                return
            if self._num_calls > MAX_CALLS:
                self._leave_unread(data[start:])
                self._intake.read_later(self)
                return
            if self._phase is Phase.IDLE:
                self._begin_head()
            start += self._feed(data[start : self._end_of_piece(data, start)])

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel_send_timer()
        self._send_timer = self.loop.call_later(self._operation.send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_send_timer()

    # What the parser calls

    def on_message_begin(self) -> None:
        if self._phase is Phase.ANSWER:  # in the piece that ended a chunked body: only these ends are not known before
            self._stop_reading()
            raise ValueError("a request is being answered")
        if self._phase is Phase.IDLE:
            self._begin_head()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_calls += 1
        if self._phase is not Phase.HEAD:
            return  # a trailer: nobody asks for them, and added to the headers they would forge some
        if len(self.headers) >= MAX_HEADERS:
            self._stop(ApiError(431, f"the request has more than {MAX_HEADERS} headers; send fewer"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._check_headers()
        self._phase = Phase.BODY
        self._num_body_bytes = self._num_framing_bytes = self._num_drained_bytes = 0
        lengths = [value for name, value in self.headers if name == b"content-length"]
        self._num_bytes_left = int(lengths[0]) if lengths else None
        self._disarm()
        self._intake.hold(self, 0)
        self._intake.work(self)
        super().on_headers_complete()
        if (self._num_bytes_left or 0) > self._max_drained_bytes:
            self.cycle.keep_alive = False  # it will be refused, and the rest is not worth reading
        if self.scope["http_version"] == "1.0":
            self.cycle.send = AnswerUntilClose(self.cycle).send  # type: ignore[method-assign]

    def on_body(self, body: bytes) -> None:
        self._num_calls += 1
        self._num_body_bytes += len(body)
        self._num_framing_bytes -= len(body)
        if self._num_bytes_left is not None:
            self._num_bytes_left -= len(body)
        if self.cycle.response_complete:
            self._num_drained_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.cycle.response_complete:
            self._become_idle()
            self._arm(self.timeout_keep_alive, self._close)
        else:
            self._phase = Phase.ANSWER

    # What the answer's task calls

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._arm(self._operation.send_timeout, self.transport.abort)
        elif self._phase is Phase.BODY:
            # the rest of a body that nobody wants is read: clients look for an answer only when they have sent theirs
            self._arm(self._operation.body_timeout, self._close)
        else:
            self._become_idle()
            if self._unread:
                self._intake.read_later(self)

    # What the intake calls

    def make_room(self) -> None:
        """Closes the connection, or if it has a request that is being answered, drops what came behind that."""
        if self._phase is Phase.ANSWER:
            self._stop_reading()
        elif self._phase is Phase.HEAD:
            message = "the rest of the request's head did not come while others needed the room; send it at once"
            self._refuse(ApiError(408, message, code="request_timeout"))
        elif self._phase is Phase.BODY:
            message = "bodies in many small chunks keep the server busy; try again, and send larger chunks"
            self._refuse(ApiError(503, message, code="overloaded"))
        else:
            self._close()

    def read_on(self) -> None:
        """Reads what was left unread, now that its turn has come."""
        if self._phase is Phase.CLOSING:
            return
        self._intake.hold(self, 0)
        self.data_received(b"")
        if not self._unread and not self.flow.read_paused:
            self.transport.resume_reading()

    # Reading

    def _make_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does: the answer comes first
        return parser

    def _begin_head(self) -> None:
        self._phase = Phase.HEAD
        self._num_head_bytes = self._num_head_lines = 0
        self._arm(self._operation.head_timeout, self._on_head_timeout)

    def _end_of_piece(self, data: bytes, start: int) -> int:
        """Where the next piece for the parser ends: at a line of a head, at the end of a body, or CHUNKED_PIECE on."""
        if self._phase is Phase.HEAD:
            room = self._operation.max_head_bytes + 1 - self._num_head_bytes
            return (data.find(b"\n", start, start + room) + 1) or min(start + room, len(data))
        length = CHUNKED_PIECE if self._num_bytes_left is None else self._num_bytes_left
        return min(start + max(length, 1), len(data))

    def _feed(self, piece: bytes) -> int:
        """Feeds the parser. Returns how many bytes it read: all, unless a request asked for another protocol."""
        if self._phase is Phase.HEAD:
            self._num_head_bytes += len(piece)
            if self._num_head_bytes > self._operation.max_head_bytes:
                limit = f"{self._operation.max_head_bytes} bytes (operation.max_head_bytes)"
                self._refuse(ApiError(431, f"the request line and headers have more than {limit}; send less"))
                return len(piece)
            self._num_head_lines += piece.endswith(b"\n")
            if self._num_head_lines > MAX_LINES:
                self._refuse(ApiError(431, f"the request has more than {MAX_HEADERS} headers; send fewer"))
                return len(piece)
        else:
            self._num_framing_bytes += len(piece)
        num_read = len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:  # we know no other: the connection goes on as it was
            self.parser = self._make_parser()
            num_read = upgrade.args[0]
        except httptools.HttpParserError as error:
            if not self._has_stopped_reading:
                self._refuse(self._refusal or bad_request(f"this is not HTTP/1.1: {error}", code="invalid_http"))
            return num_read
        self._check_counts()
        return num_read

    def _check_counts(self) -> None:
        if self._phase is Phase.HEAD:
            self._intake.hold(self, self._num_head_bytes + HEADER_COST * len(self.headers or ()))
        elif self._phase is Phase.BODY:
            max_framing_bytes = self._operation.max_head_bytes
            if not self.cycle.response_complete:  # else the body is dropped, and worth no effort
                max_framing_bytes += MAX_FRAMING_PER_BYTE * self._num_body_bytes
            if self._num_framing_bytes > max_framing_bytes:
                message = (
                    f"the chunked body has {self._num_framing_bytes} bytes of chunk sizes, extensions and trailers "
                    f"around its {self._num_body_bytes} bytes; send larger chunks and shorter trailers"
                )
                self._refuse(ApiError(431, message))
            elif self._num_drained_bytes > self._max_drained_bytes:
                self._close()

    def _check_headers(self) -> None:
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and self.parser.get_http_version() != "1.0"):
            self._stop(bad_request(f"the request has {len(hosts)} Host headers; send one", code="invalid_host"))
        if hosts and not HOST.fullmatch(hosts[0]):
            self._stop(bad_request("the Host header is no name of a host; send NAME or NAME:PORT", code="invalid_host"))
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings not in ([], [b"chunked"]):
            self._stop(bad_request("the only Transfer-Encoding that is read is chunked; send that, or a length"))

    def _stop(self, refusal: ApiError) -> None:
        """Stops the parser from within one of its callbacks, by an exception. `refusal` is then the answer."""
        self._refusal = refusal
        raise ValueError(refusal.message)

    def _leave_unread(self, data: bytes) -> None:
        self._unread = data
        self.flow.resume_reading()  # else the task that answers would end the pause below
        self.transport.pause_reading()
        self._intake.hold(self, len(data))

    def _stop_reading(self) -> None:
        """Drops all further input; the connection closes after the current answer."""
        self._has_stopped_reading = True
        self._unread = b""
        self.cycle.keep_alive = False
        self.transport.resume_reading()  # to drop what arrives, and to notice the end of the connection

    def _become_idle(self) -> None:
        self._disarm()
        self._phase = Phase.IDLE
        self.cycle = self.scope = self.headers = None  # type: ignore[assignment]  # many connections idle for long
        self._intake.wait(self)

    # Closing

    def _on_head_timeout(self) -> None:
        if self._phase is Phase.IDLE:
            self._close()
            return
        seconds = f"{self._operation.head_timeout:g} s (operation.head_timeout)"
        message = f"the request's head was not complete within {seconds}; send it at once"
        self._refuse(ApiError(408, message, code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answers without the application and closes. A task that answers already is told that the client has left."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.cycle is None or not self.cycle.response_started:
            self._write(error)
        self._close()

    def _write(self, error: ApiError) -> None:
        body = msgspec.json.encode(error_body(error))
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error_headers(error),
        }
        head = b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())
        status = f"{error.status} {HTTPStatus(error.status).phrase}".encode()
        self.transport.write(b"HTTP/1.1 " + status + b"\r\n" + head + b"\r\n" + body)

    def _close(self) -> None:
        self._phase = Phase.CLOSING
        self._intake.hold(self, 0)
        self.transport.close()
        self._arm(LINGER, self.transport.abort)

    def _arm(self, seconds: float, act: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, act)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cancel_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None


class AnswerUntilClose:
    """The answer to a request of HTTP/1.0, which has no chunks: one of unknown length ends with the connection."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send = cycle.send
        self._is_open_ended = False

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            self._is_open_ended = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            if self._is_open_ended:
                self._cycle.chunked_encoding = False
        elif message["type"] == "http.response.body" and self._is_open_ended:
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)
