"""Authentication by API keys: deny by default, decided on the path that the router will see."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from server.config import Config
from server.errors import ApiError, error_response
from server.generation.tenant_terms import NO_TERMS, TenantTerms

PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/startupz", "/health", "/ping"})
"""The probes of load balancers and orchestrators."""
KEY_HEADER = b"x-api-key"
"""Where Anthropic's clients send their key; beside another one it must be the same tenant's."""
PAGES = re.compile(r"/|/docs|/static/[^/]+")
"""Pages for people, which hold nothing of the server's: what they show they fetch with a key."""


class ApiKeys:
    """The API keys, as digests, each with its tenant: a salt that keeps its cached prefixes apart from other keys."""

    def __init__(self, keys: Collection[str], operator_keys: Collection[str] = (), *, has_file: bool = False) -> None:
        """operator_keys: that open what `keys` do, and what belongs to all tenants as well
        has_file: a key is needed even if there are none: `replace_named` will bring some
        """
        self._secret = secrets.token_bytes(16)  # so that a salt does not reveal its key
        self._has_file = has_file
        digests = [_digest(key.encode()) for key in (*keys, *operator_keys)]
        self._tenants = {digest: self._salt(digest) for digest in digests}
        self._origins = {tenant: digest for digest, tenant in self._tenants.items()}  # what tenants are made of
        self._operators = {self._tenants[_digest(key.encode())] for key in operator_keys}
        self._named: dict[bytes, str] = {}  # tenants of the keys of the file
        self._names: dict[str, str] = {}  # by tenant
        self._named_origins: dict[str, bytes] = {}
        self._terms: dict[str, TenantTerms] = {}  # by tenant

    @property
    def is_empty(self) -> bool:
        """Whether no key is needed."""
        return not self._tenants and not self._has_file

    def replace_named(self, names: Mapping[str, str], terms: Mapping[str, TenantTerms] | None = None) -> None:
        """Puts these keys in the place of those that were named before. All keys of one name are one tenant, so that a
        key can be changed for another without losing what is cached.

        names: by key; terms: by name
        """
        salts = {name: self._salt(b"name " + name.encode()) for name in names.values()}
        self._named = {_digest(key.encode()): salts[name] for key, name in names.items()}
        self._names = {salt: name for name, salt in salts.items()}
        self._named_origins = {salt: b"name " + name.encode() for name, salt in salts.items()}
        self._terms = {salts[name]: each for name, each in (terms or {}).items()}

    def name_of(self, tenant: str) -> str:
        """The name that a tenant has in the key file; "" for others."""
        return self._names.get(tenant, "")

    def terms_of(self, tenant: str) -> TenantTerms:
        return self._terms.get(tenant, NO_TERMS)

    def tenant_of(self, key: bytes) -> str | None:
        """The tenant of a key; None if it is unknown. In constant time: all digests are compared in full."""
        given = _digest(key)
        found = None
        for digest, tenant in (*self._tenants.items(), *self._named.items()):
            if hmac.compare_digest(digest, given):
                found = tenant
        return found

    def owner_of(self, tenant: str, secret: bytes) -> str:
        """A name of the tenant that outlives the server, for what is kept on a disk: it reveals the key to nobody who
        lacks the secret. "" where no key is needed."""
        origin = self._origins.get(tenant) or self._named_origins.get(tenant)
        return "" if origin is None else hmac.new(secret, b"owner " + origin, hashlib.sha256).hexdigest()[:32]

    def tenant_of_owner(self, owner: str, secret: bytes) -> str | None:
        """The tenant that has this name; None while its key is not in force."""
        if not owner:
            return "" if self.is_empty else None
        tenants = (*self._origins, *self._named_origins)
        return next((tenant for tenant in tenants if self.owner_of(tenant, secret) == owner), None)

    def is_operator(self, tenant: str) -> bool:
        """Whether a tenant may see what belongs to others. Without keys everybody may."""
        return self.is_empty or tenant in self._operators

    @property
    def num_tenants(self) -> int:
        return len({*self._tenants.values(), *self._named.values()})

    def _salt(self, origin: bytes) -> str:
        return hmac.new(self._secret, origin, hashlib.sha256).hexdigest()[:32]


class Authentication:
    """Middleware that answers 401 to requests without a needed key, and sets `tenant` and `is_operator` for others, in
    `request.state`."""

    def __init__(self, app: ASGIApp, *, config: Config, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys
        self._public_paths = PUBLIC_PATHS | ({"/metrics"} if config.metrics.public else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        tenant = self._tenant(scope)
        if tenant is None:
            message = (
                "no valid API key was sent; send the header Authorization: Bearer YOUR_KEY, or x-api-key: YOUR_KEY"
            )
            response = error_response(ApiError(401, message))
            response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["tenant"], state["is_operator"] = tenant, self._keys.is_operator(tenant)
        if name := self._keys.name_of(tenant):
            state["tenant_name"] = name
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        """The request's tenant: "" where no key is needed, None where a needed key is missing or unknown."""
        path: str = scope["path"]
        if self._keys.is_empty or path in self._public_paths or _is_page(scope["method"], path):
            return ""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        others = [value for name, value in scope["headers"] if name == KEY_HEADER]
        if len(values) > 1 or len(others) > 1:  # with two headers, a proxy may have checked the other one
            return None
        tenants = {self._tenant_of_bearer(value) for value in values} | {self._keys.tenant_of(key) for key in others}
        return tenants.pop() if len(tenants) == 1 else None

    def _tenant_of_bearer(self, value: bytes) -> str | None:
        scheme, _, key = value.partition(b" ")
        return self._keys.tenant_of(key.strip()) if scheme.lower() == b"bearer" else None


def _is_page(method: str, path: str) -> bool:
    return method == "GET" and PAGES.fullmatch(path) is not None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
