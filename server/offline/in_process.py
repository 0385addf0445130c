"""The dispatcher to the routes of this process: a line is a request to them, with nothing between."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from starlette.types import ASGIApp, Message

from server.offline.line_runner import Reply, RunEndedError
from server.offline.request_lines import RequestLine

REFUSALS = frozenset({429, 503})


class InProcess:
    """Asks the application as an HTTP server would, and as a background request: see `server.api.admit_request`."""

    def __init__(self, app: ASGIApp, *, tenant: Callable[[], str | None], is_ending: Callable[[], bool]) -> None:
        """tenant: whose requests they are; None while its key is not in force, so that they wait
        is_ending: whether the server ends, and what it refuses it will not take later
        """
        self._app, self._tenant, self._is_ending = app, tenant, is_ending

    async def send(self, line: RequestLine) -> Reply:
        tenant = self._tenant()
        if tenant is None:
            return Reply(503, "", b"the API key of the batch is not in force", is_refusal=True)
        answer = _Answer(line.body)
        request_id = f"batch-{secrets.token_hex(12)}"
        await self._app(_scope(line.url, request_id, tenant), answer.receive, answer.send)
        is_refusal = answer.status in REFUSALS
        if is_refusal and self._is_ending():
            raise RunEndedError("the server ends")
        return Reply(
            answer.status,
            answer.headers.get(b"x-request-id", request_id.encode()).decode("latin-1"),
            b"".join(answer.parts),
            is_refusal,
            _seconds(answer.headers.get(b"retry-after-ms")),
        )


class _Answer:
    """One call of the application: a body for it, and what it says."""

    def __init__(self, body: bytes) -> None:
        self.status = 500
        self.headers: dict[bytes, bytes] = {}
        self.parts: list[bytes] = []
        self._body: bytes | None = body

    async def receive(self) -> Message:
        """The body at once, and then nothing for ever: the client stays."""
        if self._body is None:
            await asyncio.get_running_loop().create_future()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.lower(): value for name, value in message.get("headers", ())}
        elif message["type"] == "http.response.body":
            self.parts.append(message.get("body", b""))


def _scope(url: str, request_id: str, tenant: str) -> dict[str, object]:
    headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        "state": {"tenant": tenant, "is_operator": False, "is_background": True},
    }


def _seconds(milliseconds: bytes | None) -> float | None:
    return int(milliseconds) / 1000 if milliseconds is not None and milliseconds.isdigit() else None
