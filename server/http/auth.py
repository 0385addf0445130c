"""Who may ask: deny by default, decided on the path that the router will see."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from starlette.types import ASGIApp, Receive, Scope, Send

from server.config import Config
from server.errors import ApiError, error_response

PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/startupz", "/health", "/ping"})
"""What load balancers and orchestrators ask."""


class Keyring:
    """The API keys, kept as digests, and for each the salt that keeps its cached prefixes apart from others'."""

    def __init__(self, keys: list[str]) -> None:
        secret = secrets.token_bytes(16)  # so that salts do not give keys away
        digests = [_digest(key.encode()) for key in keys]
        self._tenants = {digest: hmac.new(secret, digest, hashlib.sha256).hexdigest()[:32] for digest in digests}

    @property
    def is_empty(self) -> bool:
        return not self._tenants

    def tenant_of(self, key: bytes) -> str | None:
        """None for an unknown key. Takes equally long for every key, known or not: all are compared, and to the end."""
        given = _digest(key)
        found = None
        for digest, tenant in self._tenants.items():
            if hmac.compare_digest(digest, given):
                found = tenant
        return found


class Authentication:
    """Middleware: lets through what carries a key, or needs none. Sets `request.state.tenant`."""

    def __init__(self, app: ASGIApp, *, config: Config) -> None:
        self._app = app
        self._keys = Keyring(config.server.api_keys)
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
        scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        """ "" where no key is needed, None where a needed one is not there."""
        if self._keys.is_empty or scope["path"] in self._public_paths:
            return ""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:  # of two, others on the way may have looked at the other
            return None
        scheme, _, key = values[0].partition(b" ")
        return self._keys.tenant_of(key.strip()) if scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
