"""The middleware that normalises paths: a prefix, doubled slashes, and one at the end."""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

TEXT_PATHS = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/api/chat",
        "/api/generate",
    }
)
"""The routes whose requests are those "for text" of the metrics."""
_SLASHES = re.compile("/{2,}")


class RootPath:
    """Takes the prefix from paths under which a load balancer has put the server, for one that leaves it there."""

    def __init__(self, app: ASGIApp, *, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root = self._root_path
        if scope["type"] == "http":
            path = scope["path"]
            if path == root or path.startswith(f"{root}/"):
                path = path[len(root) :] or "/"
            scope = {**scope, "path": path, "root_path": root}  # which the OpenAPI document names
        await self._app(scope, receive, send)


class TidyPath:
    """Rewrites `//v1/models` and `/v1/models/` to `/v1/models`, since clients join base URLs and paths in many ways.

    It must come before authentication, which decides on the path that the router will see. Of a route that ends in an
    id, what comes before the id is spelt for the client; slashes in it and behind it belong to it.
    """

    def __init__(self, app: ASGIApp, *, routes: Collection[str]) -> None:
        self._app = app
        self._routes = frozenset(routes)
        prefixes = {route.partition("{")[0] for route in routes if "{" in route}
        self._prefixes = {prefix: re.compile(prefix.replace("/", "/+")) for prefix in prefixes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._routes:
            scope = {**scope, "path": self._tidy(scope["path"])}
        await self._app(scope, receive, send)

    def _tidy(self, path: str) -> str:
        tidy = _SLASHES.sub("/", path).rstrip("/")
        if tidy in self._routes:
            return tidy
        for prefix, pattern in self._prefixes.items():
            if match := pattern.match(path):
                return prefix + path[match.end() :]
        return path
