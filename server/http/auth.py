"""Authentication by API keys: deny by default, decided on the path that the router will see."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from server.config import Config
from server.errors import ApiError, error_response

PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/startupz", "/health", "/ping"})
"""The probes of load balancers and orchestrators."""
PAGES = re.compile(r"/|/docs|/static/[^/]+")
"""Pages for people, which hold nothing of the server's: what they show they fetch with a key."""


class ApiKeys:
    """The API keys, as digests, each with its tenant: a salt that keeps its cached prefixes apart from other keys."""

    def __init__(self, keys: Collection[str], operator_keys: Collection[str] = ()) -> None:
        """operator_keys: that open what `keys` do, and what belongs to all tenants as well"""
        secret = secrets.token_bytes(16)  # so that a salt does not reveal its key
        digests = [_digest(key.encode()) for key in (*keys, *operator_keys)]
        self._tenants = {digest: hmac.new(secret, digest, hashlib.sha256).hexdigest()[:32] for digest in digests}
        self._operators = {self._tenants[_digest(key.encode())] for key in operator_keys}

    @property
    def is_empty(self) -> bool:
        return not self._tenants

    def tenant_of(self, key: bytes) -> str | None:
        """The tenant of a key; None if it is unknown. In constant time: all digests are compared in full."""
        given = _digest(key)
        found = None
        for digest, tenant in self._tenants.items():
            if hmac.compare_digest(digest, given):
                found = tenant
        return found

    def is_operator(self, tenant: str) -> bool:
        """Whether a tenant may see what belongs to others. Without keys everybody may."""
        return self.is_empty or tenant in self._operators


class Authentication:
    """Middleware that answers 401 to requests without a needed key, and sets `tenant` and `is_operator` for others, in
    `request.state`."""

    def __init__(self, app: ASGIApp, *, config: Config) -> None:
        self._app = app
        self._keys = ApiKeys(config.server.api_keys, config.server.operator_keys)
        self._public_paths = PUBLIC_PATHS | ({"/metrics"} if config.metrics.public else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        tenant = self._tenant(scope)
        if tenant is None:
            message = "no valid API key was sent; send the header Authorization: Bearer YOUR_KEY"
            response = error_response(ApiError(401, message))
            response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["tenant"], state["is_operator"] = tenant, self._keys.is_operator(tenant)
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        """The request's tenant: "" where no key is needed, None where a needed key is missing or unknown."""
        path: str = scope["path"]
        if self._keys.is_empty or path in self._public_paths or _is_page(scope["method"], path):
            return ""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:  # with two headers, a proxy may have checked the other one
            return None
        scheme, _, key = values[0].partition(b" ")
        return self._keys.tenant_of(key.strip()) if scheme.lower() == b"bearer" else None


def _is_page(method: str, path: str) -> bool:
    return method == "GET" and PAGES.fullmatch(path) is not None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
