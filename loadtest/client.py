"""One request to an OpenAI-compatible server, timed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType

import httpx
import msgspec

from loadtest.answer_reader import AnswerReader, Expectation
from loadtest.outcome import Failure, FailureKind, Outcome
from loadtest.transport import TimedBody, TimedTransport
from loadtest.workload import Exchange, Prompt

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


class Client:
    """Sends exchanges to one target. An async context manager. `num_events` counts the events of ended streams."""

    def __init__(self, target: Target) -> None:
        self.target = target
        headers = {"accept-encoding": "identity", "content-type": "application/json"}
        headers["connection"] = "keep-alive" if target.keeps_alive else "close"
        transport = TimedTransport(keeps_alive=target.keeps_alive)
        if target.api_key:
            headers["authorization"] = f"Bearer {target.api_key}"
        self.http = httpx.AsyncClient(
            transport=transport, base_url=target.base_url, headers=headers, timeout=target.timeout
        )
        self._path = "/v1/chat/completions" if target.api is Api.CHAT else "/v1/completions"
        self.num_events = 0

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.aclose()

    def body(self, exchange: Exchange) -> bytes:
        """The JSON that is sent."""
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
        body.update(target.extra_body)
        return msgspec.json.encode({key: value for key, value in body.items() if value is not None})

    def _prompt(self, prompt: Prompt) -> dict[str, JsonValue | Prompt]:
        if self.target.api is Api.COMPLETIONS:
            return {"prompt": prompt}
        if not isinstance(prompt, str):
            raise ValueError("the chat API takes text, not token ids; use text prompts with it")
        messages: list[JsonValue] = [{"role": "user", "content": prompt}]
        return {"messages": messages}

    async def send(self, exchange: Exchange, *, intended_at: float | None = None) -> Outcome:
        """Sends, reads to the end and judges. Latencies count from `intended_at`, or from the sending without it."""
        body = self.body(exchange)
        asked = None if self.target.ignore_eos is IgnoreEos.NO else exchange.num_output_tokens
        expectation = Expectation(asked, self.target.has_done_marker)
        sent_at = time.perf_counter()
        started_at = sent_at if intended_at is None else intended_at
        try:
            async with asyncio.timeout(self.target.timeout):
                return await self._exchange(body, expectation, started_at=started_at, sent_at=sent_at)
        except TimeoutError:
            return _failure(FailureKind.TIMEOUT, f"no complete answer after {self.target.timeout:g} s", started_at)
        except httpx.ConnectTimeout as error:
            return _failure(FailureKind.TIMEOUT, str(error), started_at)
        except httpx.ConnectError as error:
            return _failure(FailureKind.CONNECT, str(error), started_at)
        except httpx.TransportError as error:
            return _failure(FailureKind.DISCONNECT, str(error), started_at)

    async def _exchange(self, body: bytes, expectation: Expectation, *, started_at: float, sent_at: float) -> Outcome:
        async with self.http.stream("POST", self._path, content=body) as response:
            if response.status_code != 200:
                text = (await response.aread())[:300].decode(errors="replace")
                return _failure(f"http_{response.status_code}", text, started_at)
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                return _failure(FailureKind.NOT_A_STREAM, f"content-type {kind or 'missing'}", started_at)
            reader = AnswerReader()
            timed_body = response.extensions["body"]
            assert isinstance(timed_body, TimedBody)
            await timed_body.deliver(reader.feed)
            self.num_events += reader.num_events
            return reader.outcome(expectation, started_at=started_at, sent_at=sent_at)


def _failure(kind: str, detail: str, started_at: float) -> Failure:
    return Failure(str(kind), detail, started_at, time.perf_counter())
