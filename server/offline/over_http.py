"""The dispatcher to a server elsewhere, over HTTP."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import httpx

from server.offline.line_runner import Reply, RunEndedError, UnreachableError
from server.offline.request_lines import RequestLine

REFUSALS = frozenset({429, 502, 503, 504})  # 502 and 504 are a load balancer's
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 3600.0  # that an answer may take: nothing of it comes before it is whole
KEEP_ALIVES = [  # a server that has vanished is noticed in two minutes, however long answers take
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
        if hasattr(socket, name)  # not everywhere
    ),
]


def key_for_server(api_keys: Sequence[str]) -> str | None:
    """The first of this configuration's keys, or that of OpenAI's clients."""
    return next(iter(api_keys), None) or os.environ.get("OPENAI_API_KEY")


def problem_of(url: str, key: str | None) -> str:
    """Why no request can be made of the address and the key; nothing where it can be tried."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        return f"--url {url}: must be the address of a server, such as http://127.0.0.1:8000"
    if key and not (key.isascii() and key.isprintable()):
        return "the API key (PEREGRINE_API_KEY, OPENAI_API_KEY) must be printable ASCII"
    return ""


class OverHttp:
    """A client of one server. Use as `async with`."""

    def __init__(self, url: str, *, key: str | None, max_connections: int | None) -> None:
        """url: with or without /v1 at its end. max_connections: None for as many as there are requests."""
        self.url = url.rstrip("/").removesuffix("/v1")
        limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, pool=None),
            transport=httpx.AsyncHTTPTransport(limits=limits, socket_options=KEEP_ALIVES),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def check(self) -> None:
        """Raises RunEndedError where no server answers there, or none that takes the key."""
        try:
            response = await self._client.get("/v1/models", timeout=CONNECT_SECONDS)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RunEndedError(
                f"no server answers at {self.url}: {_reason(error)}; start one, or name another"
            ) from None
        self._check_key(response)

    async def max_num_seqs(self) -> int | None:
        """How many requests the server runs at once, where it says so."""
        try:
            response = await self._client.get("/v1/server/status", timeout=CONNECT_SECONDS)
            value = response.json()["model"]["settings"]["scheduler.max_num_seqs"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        return value if isinstance(value, int) and value > 0 else None

    async def send(self, line: RequestLine) -> Reply:
        try:
            response = await self._client.post(
                line.url, content=line.body, headers={"Content-Type": "application/json"}
            )
        except httpx.HTTPError as error:
            raise UnreachableError(f"{self.url}: {_reason(error)}") from None
        self._check_key(response)
        return Reply(
            response.status_code,
            response.headers.get("x-request-id", ""),
            response.content,
            response.status_code in REFUSALS,
            _retry_after(response),
        )

    def _check_key(self, response: httpx.Response) -> None:
        if response.status_code == 401:
            raise RunEndedError(f"{self.url} needs a valid API key; set PEREGRINE_API_KEY, or OPENAI_API_KEY")


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds, at most a minute: more would only be a guess."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = response.headers.get(name, "")
        if text.isdecimal() and len(text) < 10:
            return min(int(text) * scale, 60.0)
    return None


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
