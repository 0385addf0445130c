"""The middleware around all others: a request id, the access log, and a 500 for exceptions that nothing else caught."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import error_response, internal_error
from server.http.auth import PUBLIC_PATHS
from server.http.paths import TEXT_PATHS
from server.telemetry.tracing import PassedOn, RequestSpan, Tracing, parse_traceparent

access_log = logging.getLogger("peregrine.access")
logger = logging.getLogger("peregrine.server")

USABLE_ID = re.compile(rb"[A-Za-z0-9._:=+/@-]{1,128}")  # goes into logs, bodies and headers
QUIET_PATHS = PUBLIC_PATHS | {"/metrics"}
"""Logged at a lower level, since they are polled."""
LINE = "id=%s client=%s method=%s path=%s status=%s bytes=%d first_byte_seconds=%.3f seconds=%.3f complete=%s%s%s%s"


class RequestContext:
    """Outermost middleware: sets the request id, logs one line at the end, and answers 500 to exceptions."""

    def __init__(self, app: ASGIApp, *, is_ending: Callable[[], bool], tracing: Tracing) -> None:
        """is_ending: whether the server drains; answers then close their connections, so that clients go elsewhere"""
        self._app = app
        self._tracing = tracing
        self._is_ending = is_ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        reply = Reply(send, state, span=self._start_span(scope), is_ending=self._is_ending)
        try:
            await self._app(scope, receive, reply.send)
        except ClientDisconnect:
            pass  # in the middle of its body; there is nobody to answer
        except Exception:
            logger.exception("request %s failed", request_id)
            if reply.status is None:  # else the connection is closed in the middle, which clients notice
                await error_response(internal_error(request_id))(scope, receive, reply.send)
        finally:
            reply.end(scope)

    def _start_span(self, scope: Scope) -> RequestSpan:
        """One span for a request, whatever its answer is made of; none for those that are polled."""
        parent = parse_traceparent([value for name, value in scope["headers"] if name == b"traceparent"])
        path, method = scope["path"], scope["method"]
        if path in QUIET_PATHS:
            return PassedOn(parent)
        # ids in other paths would be names without end
        return self._tracing.start(parent, name=f"{method} {path}" if path in TEXT_PATHS else method)


class Reply:
    """Records status, size and times of a response while it is sent."""

    def __init__(self, send: Send, state: dict[str, str], *, span: RequestSpan, is_ending: Callable[[], bool]) -> None:
        self.status: int | None = None
        self._send = send
        self._is_ending = is_ending
        self._span = span
        self._state = state  # the request's own; a route may put a better id there, and `log_fields`
        self._started_at = time.monotonic()
        self._first_byte_at: float | None = None
        self._num_bytes = 0
        self._is_complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self._state["request_id"].encode())]
            if self._is_ending():
                headers.append((b"connection", b"close"))
            if (trace := self._span.context) is not None:
                headers.append((b"traceparent", trace.header.encode()))
            message["headers"] = headers
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if body and self._first_byte_at is None:
                self._first_byte_at = time.monotonic()
            self._num_bytes += len(body)
            self._is_complete = not message.get("more_body", False)
        await self._send(message)

    def end(self, scope: Scope) -> None:
        """Writes the access log's line and ends the span, without query and body, which may hold what users wrote."""
        now = time.monotonic()
        path = scope.get("raw_path", b"").partition(b"?")[0].decode("ascii", "backslashreplace")
        fields, trace = self._state.get("log_fields", ""), self._span.context
        self._span.end(
            self.status,
            {"request.id": self._state["request_id"], "http.request.method": scope["method"], "url.path": path}
            | {name: int(text) if text.isdecimal() else text for name, text in _pairs(fields)},
            first_byte_after=self._first_byte_at and self._first_byte_at - self._started_at,
        )
        level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
        access_log.log(
            level,
            LINE,
            self._state["request_id"],
            _address(scope),
            scope["method"],
            path,
            self.status,
            self._num_bytes,
            (self._first_byte_at or now) - self._started_at,
            now - self._started_at,
            "yes" if self._is_complete else "no",
            f" tenant={name}" if (name := self._state.get("tenant_name")) else "",
            f" trace={trace.trace_id}" if trace is not None else "",
            f" {fields}" if fields else "",
        )


def _pairs(fields: str) -> Iterator[tuple[str, str]]:
    """The parts of "a=1 b=2"."""
    for field in fields.split():
        name, _, text = field.partition("=")
        yield name, text


def _address(scope: Scope) -> str:
    """The client's address; "-" for none, and for what a proxy that is trusted has let pass as one."""
    host = (scope.get("client") or ("",))[0]
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return "-"


def _request_id(scope: Scope) -> str:
    """The caller's X-Request-Id where it is usable, else a new one."""
    given: list[bytes] = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and USABLE_ID.fullmatch(given[0]):
        return given[0].decode()
    return uuid.uuid4().hex
