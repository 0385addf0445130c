"""The middleware that words errors as the API of their path does: whoever raised them, they come in OpenAI's body."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import msgspec
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.protocol.responses import ErrorReply

WordError = Callable[[int, ErrorReply, str], msgspec.Struct]
"""From a status, an error and the request's id to the body of another API."""

_SLASHES = re.compile("/{2,}")


class Envelopes:
    """Rewrites the JSON bodies of statuses from 400 on. Streams, whose status is 200, word their errors themselves."""

    def __init__(self, app: ASGIApp, *, by_prefix: Mapping[str, WordError]) -> None:
        """by_prefix: of paths, such as "/v1/messages", which is then also that of "/v1/messages/count_tokens\""""
        self._app = app
        self._by_prefix = by_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        word = self._word_of(scope["path"]) if scope["type"] == "http" else None
        if word is None:
            await self._app(scope, receive, send)
            return
        started: Message | None = None

        async def send_worded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start" and message["status"] >= 400:
                started = message  # its length is not known yet
                return
            if message["type"] == "http.response.body" and started is not None:
                message = _worded(started, message, word)
                await send(started)
                started = None
            await send(message)

        await self._app(scope, receive, send_worded)

    def _word_of(self, path: str) -> WordError | None:
        tidy = _SLASHES.sub("/", path)
        for prefix, word in self._by_prefix.items():
            if tidy == prefix or tidy.startswith(prefix + "/"):
                return word
        return None


def _worded(start: Message, body: Message, word: WordError) -> Message:
    """The body in other words; changes the length in the start. What is no error of ours stays as it is."""
    headers = MutableHeaders(raw=start["headers"])
    try:
        error = msgspec.json.decode(body.get("body", b""), type=ErrorReply)
    except msgspec.DecodeError:
        return body
    text = msgspec.json.encode(word(start["status"], error, headers.get("x-request-id", "")))
    headers["content-length"] = str(len(text))
    start["headers"] = headers.raw
    return {**body, "body": text}
