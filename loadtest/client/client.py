"""One request to an OpenAI-compatible server, timed."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from loadtest.client.answer_reader import AnswerReader
from loadtest.client.outcome import Failure, FailureKind, Outcome
from loadtest.client.transport import Connections, Headers, ResponseError, Sink
from loadtest.workload.prompts import Exchange, Message, Prompt

Result = TypeVar("Result")
JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


class Api(StrEnum):
    COMPLETIONS = "completions"
    CHAT = "chat"


class IgnoreEos(StrEnum):
    """SENT: `ignore_eos: true` is in the body. ELSEWHERE: the extra body says it in the server's own way. In both cases
    an answer of another length is a failure. NO: the model may end its answer."""

    SENT = "sent"
    ELSEWHERE = "elsewhere"
    NO = "no"


@dataclass(frozen=True)
class Target:
    """A server and how to speak to it. `extra_body` is laid over each body; a null there takes the field out.

    timeout: seconds from sending to the end of the answer
    keeps_alive: send several requests over one connection, one after another; otherwise each has its own
    """

    url: str
    model: str | None = None
    api: Api = Api.COMPLETIONS
    ignore_eos: IgnoreEos = IgnoreEos.SENT
    temperature: float = 0.0
    extra_body: Mapping[str, JsonValue] = field(default_factory=dict)
    api_key: str | None = None
    timeout: float = 600.0
    has_done_marker: bool = True
    keeps_alive: bool = False

    @property
    def base_url(self) -> str:
        """Without a trailing slash and without `/v1`."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def authorization(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


class Client:
    """Sends exchanges to one target. An async context manager. `num_events` counts the events of ended streams."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.num_events = 0
        self._connections = Connections(target.base_url, keeps_alive=target.keeps_alive)
        url = urlsplit(target.base_url)
        path = "/v1/chat/completions" if target.api is Api.CHAT else "/v1/completions"
        head = [f"POST {url.path}{path} HTTP/1.1", f"host: {url.netloc.rpartition('@')[2]}"]
        head += ["accept-encoding: identity", "content-type: application/json"]
        head += ["connection: " + ("keep-alive" if target.keeps_alive else "close")]
        self._head = "".join(f"{line}\r\n" for line in head).encode()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._connections.close()

    def body(self, exchange: Exchange) -> bytes:
        """The JSON of a request."""
        target = self.target
        body: dict[str, JsonValue | Prompt] = {
            "model": target.model,
            **self._prompt(exchange.prompt),
            "max_tokens": exchange.num_output_tokens,
            "temperature": target.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if target.ignore_eos is IgnoreEos.SENT:
            body["ignore_eos"] = True
        if exchange.seed is not None:
            body["seed"] = exchange.seed
        body.update(target.extra_body)
        return msgspec.json.encode({key: value for key, value in body.items() if value is not None})

    def _prompt(self, prompt: Prompt) -> dict[str, JsonValue | Prompt]:
        if self.target.api is Api.COMPLETIONS:
            if isinstance(prompt, tuple):
                raise ValueError("the completions API takes no messages; use the chat API with a scenario of chats")
            return {"prompt": prompt}
        if isinstance(prompt, list):
            raise ValueError("the chat API takes text, not token ids; use text prompts with it")
        said = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        messages: list[JsonValue] = [{"role": each.role, "content": each.content} for each in said]
        return {"messages": messages}

    def _headers(self, exchange: Exchange, num_bytes: int) -> bytes:
        key = exchange.api_key or self.target.api_key
        authorization = f"authorization: Bearer {key}\r\n".encode() if key else b""
        return self._head + authorization + b"content-length: %d\r\n\r\n" % num_bytes

    async def send(self, exchange: Exchange, *, intended_at: float | None = None) -> Outcome:
        """Sends one request and reads its answer. Latencies count from `intended_at`, else from the sending."""
        body = self.body(exchange)
        request = self._headers(exchange, len(body)) + body
        asked = None if self.target.ignore_eos is IgnoreEos.NO else exchange.num_output_tokens
        reader, refusal = AnswerReader(asked, has_done_marker=self.target.has_done_marker), _Refusal()

        def on_head(status: int, headers: Headers) -> Sink:
            is_stream = status == 200 and headers.get(b"content-type", b"").startswith(b"text/event-stream")
            return reader.feed if is_stream else refusal.begin(status, headers)

        sent_at = time.perf_counter()
        started_at = sent_at if intended_at is None else intended_at
        try:
            async with asyncio.timeout(self.target.timeout), self._connections.one() as connection:
                await connection.exchange(request, on_head)
        except TimeoutError:
            kind, detail = FailureKind.TIMEOUT, f"no complete answer after {self.target.timeout:g} s"
        except OSError as error:
            kind, detail = FailureKind.CONNECT, f"{self.target.base_url}: {error}"
        except ResponseError as error:
            kind, detail = FailureKind.DISCONNECT, str(error)
        else:
            if refusal.kind:
                now = time.perf_counter()
                return Failure(refusal.kind, refusal.detail, started_at, now, refusal.retry_after)
            self.num_events += reader.num_events
            return reader.outcome(started_at=started_at, sent_at=sent_at)
        return Failure(kind, detail, started_at, time.perf_counter())


class _Refusal:
    """A response that is no stream of events. kind: as failures are counted; empty while there is none"""

    def __init__(self) -> None:
        self.kind = self._content_type = ""
        self.retry_after: float | None = None
        self._text = b""

    def begin(self, status: int, headers: Headers) -> Sink:
        self.kind = FailureKind.NOT_A_STREAM if status == 200 else f"http_{status}"
        self._content_type = headers.get(b"content-type", b"missing").decode(errors="replace")
        for name, unit in ((b"retry-after", 1.0), (b"retry-after-ms", 0.001)):
            if (value := headers.get(name, b"")).isdigit():
                self.retry_after = int(value) * unit
        return self._take

    def _take(self, received_at: float, piece: bytes) -> None:
        self._text += piece[: 300 - len(self._text)]

    @property
    def detail(self) -> str:
        if self.kind == FailureKind.NOT_A_STREAM:
            return f"content-type {self._content_type}"
        return self._text.decode(errors="replace")


def _allow_many_connections() -> None:
    """As many as the system lets this process have: in an open loop they are as many as a slow server makes them."""
    with contextlib.suppress(OSError, ValueError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def run_in_loop(work: Coroutine[None, None, Result]) -> Result:
    """Runs a coroutine on uvloop where that is installed, at half the cost per event of asyncio's loop."""
    _allow_many_connections()
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)
