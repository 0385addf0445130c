"""The middleware around all others: a request id, the access log, and a 500 for exceptions that nothing else caught."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import error_response, internal_error
from server.http.auth import PUBLIC_PATHS

access_log = logging.getLogger("peregrine.access")
logger = logging.getLogger("peregrine.server")

USABLE_ID = re.compile(rb"[A-Za-z0-9._:=+/@-]{1,128}")  # goes into logs, bodies and headers
QUIET_PATHS = PUBLIC_PATHS | {"/metrics"}
"""Logged at a lower level, since they are polled."""


class RequestContext:
    """Outermost middleware: sets the request id, logs one line at the end, and answers 500 to exceptions."""

    def __init__(self, app: ASGIApp, *, is_ending: Callable[[], bool]) -> None:
        """is_ending: whether the server drains; answers then close their connections, so that clients go elsewhere"""
        self._app = app
        self._is_ending = is_ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        reply = Reply(send, state, is_ending=self._is_ending)
        try:
            await self._app(scope, receive, reply.send)
        except ClientDisconnect:
            pass  # in the middle of its body; there is nobody to answer
        except Exception:
            logger.exception("request %s failed", request_id)
            if reply.status is None:  # else the connection is closed in the middle, which clients notice
                await error_response(internal_error(request_id))(scope, receive, reply.send)
        finally:
            reply.log(scope)


class Reply:
    """Records status, size and times of a response while it is sent."""

    def __init__(self, send: Send, state: dict[str, str], *, is_ending: Callable[[], bool]) -> None:
        self.status: int | None = None
        self._send = send
        self._is_ending = is_ending
        self._state = state  # the request's own; a route may put a better id there, and `log_fields`
        self._started_at = time.monotonic()
        self._first_byte_at: float | None = None
        self._num_bytes = 0
        self._is_complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self._state["request_id"].encode())]
            message["headers"] = [*headers, (b"connection", b"close")] if self._is_ending() else headers
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if body and self._first_byte_at is None:
                self._first_byte_at = time.monotonic()
            self._num_bytes += len(body)
            self._is_complete = not message.get("more_body", False)
        await self._send(message)

    def log(self, scope: Scope) -> None:
        """Writes the access log's line, without query and body, which may hold what users wrote."""
        now = time.monotonic()
        level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
        access_log.log(
            level,
            "id=%s client=%s method=%s path=%s status=%s bytes=%d first_byte_seconds=%.3f seconds=%.3f complete=%s%s%s",
            self._state["request_id"],
            _address(scope),
            scope["method"],
            scope.get("raw_path", b"").partition(b"?")[0].decode("ascii", "backslashreplace"),
            self.status,
            self._num_bytes,
            (self._first_byte_at or now) - self._started_at,
            now - self._started_at,
            "yes" if self._is_complete else "no",
            f" tenant={name}" if (name := self._state.get("tenant_name")) else "",
            f" {fields}" if (fields := self._state.get("log_fields")) else "",
        )


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
