"""Middleware for careless spellings of a path: doubled slashes, and one at the end."""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES = re.compile("/{2,}")


class TidyPath:
    """Lets `//v1/models` and `/v1/models/` find `/v1/models`, as clients join base URLs and paths in many ways.

    It must come before authentication, which decides on the path that the router will see. Only whole routes are
    spelt for the client: behind a route that ends in an id, slashes belong to the id.
    """

    def __init__(self, app: ASGIApp, *, routes: Collection[str]) -> None:
        self._app = app
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._routes:
            tidy = _SLASHES.sub("/", scope["path"]).rstrip("/")
            path = tidy if tidy in self._routes else f"/{scope['path'].lstrip('/')}"
            scope = {**scope, "path": path}
        await self._app(scope, receive, send)
