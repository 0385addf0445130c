"""Cross-origin resource sharing (CORS): which web pages' scripts may call the server."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from server.errors import bad_request, error_response

EXPOSED_HEADERS = ("x-request-id", "x-ignored-fields", "retry-after", "retry-after-ms", "x-should-retry")


class CrossOrigin(CORSMiddleware):
    """Starlette's CORS for these origins, with our error body. Keys travel in a header, so no cookies are allowed."""

    def __init__(self, app: ASGIApp, *, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        allowed = super().preflight_response(request_headers)
        if allowed.status_code == 200:
            return allowed
        origin, method = request_headers["origin"], request_headers["access-control-request-method"]
        message = (
            f"a page of {origin[:200]!r} may not send {method[:20]!r} to this server; server.cors_origins lists the "
            f"origins that may call it, with {', '.join(self.allow_methods)}"
        )
        refused = error_response(bad_request(message, code="origin_not_allowed"))
        for name in ("Vary", "Access-Control-Allow-Origin"):  # with an origin that is allowed, the page may read why
            if name in allowed.headers:
                refused.headers[name] = allowed.headers[name]
        return refused
