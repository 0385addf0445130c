"""Counts requests for text that are refused before a route sees them: for want of a key, or for their declared size."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.paths import TEXT_PATHS
from server.telemetry.metrics import Metrics
from server.telemetry.request_record import IS_COUNTED


class CountRefusals:
    """Middleware that enters into the metrics what no `RequestRecord` was made for, so that the totals of `/metrics`
    are what clients counted. It must stand where paths are tidy, and around all that refuses."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in TEXT_PATHS:
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start" and IS_COUNTED not in state:
                state[IS_COUNTED] = True
                self._metrics.request_arrived()
                self._metrics.request_refused(message["status"])
            await send(message)

        await self._app(scope, receive, count_and_send)
