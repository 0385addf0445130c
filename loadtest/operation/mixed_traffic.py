"""Traffic as a public server has it: streams and whole answers, clients that leave, and requests that are wrong.

Every kind of request knows the status that it must have. So clients can be held against what the server counts,
status by status.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from loadtest.client.answer_reader import EventSplitter
from loadtest.client.client import JsonValue
from loadtest.operation.stage import NAME
from loadtest.workload.prompts import Exchange

LEFT = "left"  # the client did not wait for what became of it
MAX_EXAMPLES = 8
Body = dict[str, JsonValue]


@dataclass(frozen=True)
class Kind:
    """A kind of request. fields: of the body, over the usual ones. statuses: that it may have. share: of the traffic,
    relative to the others'. leaves: the client ends it in its middle"""

    name: str
    statuses: tuple[int, ...]
    share: int = 1
    fields: Body = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    leaves: bool = False
    is_chat: bool = False
    is_same: bool = False  # its text is that of any other answer to the prompt
    padding: int = 0  # bytes


def kinds(*, has_chat: bool, max_body_bytes: int) -> list[Kind]:
    """All kinds. has_chat: whether the model has a chat template"""
    all_kinds = [
        Kind("stream", (200,), 8, {"stream": True}, is_same=True),
        Kind("whole", (200,), 4, is_same=True),
        Kind("two choices", (200,), 2, {"n": 2, "seed": 3, "temperature": 0.9}),
        Kind(
            "sampled, with log-probabilities", (200,), 2, {"seed": 5, "temperature": 0.8, "logprobs": 3, "stream": True}
        ),
        Kind("stop string", (200,), 1, {"stop": ["e", "7"], "stream": True}),
        Kind("chat", (200,), 3, {"stream": True}, is_chat=True),
        Kind("left stream", (200,), 3, {"stream": True}, leaves=True),
        Kind("left answer", (200,), 2, leaves=True),
        Kind("deadline", (200, 408), 1, {"timeout": 0.05}),
        Kind("wrong value", (400,), 1, {"max_tokens": -1}),
        Kind("wrong model", (404,), 1, {"model": "no-such-model"}),
        Kind("no key", (401,), 1, headers={"Authorization": "Bearer nobody's"}),
        Kind("too large", (413,), 1, padding=max_body_bytes),
        Kind("coding that is not read", (415,), 1, headers={"Content-Encoding": "br"}),
    ]
    return [kind for kind in all_kinds if has_chat or not kind.is_chat]


@dataclass
class Books:
    """What clients counted. statuses: of requests that were answered, "left" for those that were not waited for"""

    num_sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    num_surprises: int = 0

    def enter(self, kind: Kind, status: int | str) -> None:
        self.statuses[str(status)] += 1
        self.by_kind[kind.name] += 1
        if status != LEFT and status not in kind.statuses:
            self.surprise(kind, f"status {status}, not {kind.statuses}")

    def surprise(self, kind: Kind, what: str) -> None:
        self.num_surprises += 1
        if len(self.surprises) < MAX_EXAMPLES:
            self.surprises.append(f"{kind.name}: {what[:200]}")


class MixedTraffic:
    """`num_clients` clients, each of which sends a request of a random kind when its last has ended."""

    def __init__(
        self,
        url: str,
        api_key: str,
        exchanges: Sequence[Exchange],
        kinds: Sequence[Kind],
        *,
        num_clients: int,
        seed: int,
    ) -> None:
        self.books = Books()
        self._url, self._headers = url, {"Authorization": f"Bearer {api_key}"}
        self._exchanges, self._kinds = exchanges, kinds
        self._num_clients = num_clients
        self._random = random.Random(seed)
        self._texts: dict[int, str] = {}

    async def run_for(self, seconds: float) -> Books:
        deadline = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._num_clients)
        async with httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._send_in_turn(client, deadline) for _ in range(self._num_clients)))
        return self.books

    async def _send_in_turn(self, client: httpx.AsyncClient, deadline: float) -> None:
        shares = [kind.share for kind in self._kinds]
        while time.monotonic() < deadline:
            kind = self._random.choices(self._kinds, shares)[0]
            await self._send(client, kind, self._random.randrange(len(self._exchanges)))

    async def _send(self, client: httpx.AsyncClient, kind: Kind, number: int) -> None:
        self.books.num_sent += 1
        try:
            if kind.leaves:
                await self._leave(client, kind, number)
                return
            response = await client.post(_path(kind), content=self._content(kind, number), headers=_headers(kind))
        except httpx.TransportError as error:
            self.books.enter(kind, LEFT)
            self.books.surprise(kind, f"{type(error).__name__}: {error}")
            return
        self.books.enter(kind, response.status_code)
        if response.status_code == 200:
            self._check_text(kind, number, response)

    async def _leave(self, client: httpx.AsyncClient, kind: Kind, number: int) -> None:
        """Leaves after some events, or after some time; it may have had everything by then."""
        patience, num_pieces = self._random.random() * 0.5, self._random.randrange(1, 12)
        is_whole = False
        try:
            async with asyncio.timeout(10.0 if kind.fields else patience):
                content = self._content(kind, number)
                async with client.stream("POST", _path(kind), content=content, headers=_headers(kind)) as response:
                    async for _ in response.aiter_raw():
                        num_pieces -= 1
                        if num_pieces == 0 and kind.fields:
                            break
                    else:
                        is_whole = True
        except TimeoutError:
            pass
        self.books.enter(kind, 200 if is_whole else LEFT)

    def _content(self, kind: Kind, number: int) -> bytes:
        exchange = self._exchanges[number]
        prompt: Body = {"prompt": str(exchange.prompt)}
        if kind.is_chat:
            prompt = {"messages": [{"role": "user", "content": str(exchange.prompt)}]}
        body: Body = {
            "model": NAME,
            "max_tokens": exchange.num_output_tokens,
            "temperature": 0,
            **prompt,
            **kind.fields,
        }
        return json.dumps(body).encode() + b" " * kind.padding

    def _check_text(self, kind: Kind, number: int, response: httpx.Response) -> None:
        try:
            text = streamed_text(response.content) if kind.fields.get("stream") else whole_text(response.content)
        except (ValueError, KeyError, IndexError) as error:
            self.books.surprise(kind, f"no whole answer: {error}")
            return
        if kind.is_same and text != self._texts.setdefault(number, text):
            self.books.surprise(kind, f"prompt {number} was answered with another text than before")


def streamed_text(content: bytes) -> str:
    """The text of a stream. Raises ValueError where it is not whole, or ended twice."""
    events = EventSplitter().feed(content)
    if not events or events[-1] != b"[DONE]":
        raise ValueError("the stream ended without [DONE]")
    texts, ended = [], set()
    for event in map(json.loads, events[:-1]):
        if "error" in event:
            raise ValueError(f"an error within the stream: {event['error']}")
        for choice in event["choices"]:
            if choice["index"] in ended:
                raise ValueError("a choice went on behind its end")
            if choice["finish_reason"] is not None:
                ended.add(choice["index"])
            texts.append(choice["text"] if "text" in choice else choice["delta"].get("content") or "")
    if not ended:
        raise ValueError("no choice had a finish reason")
    return "".join(texts)


def whole_text(content: bytes) -> str:
    return "".join(choice["text"] for choice in json.loads(content)["choices"])


def _path(kind: Kind) -> str:
    return "/v1/chat/completions" if kind.is_chat else "/v1/completions"


def _headers(kind: Kind) -> dict[str, str]:
    return {"Content-Type": "application/json", **kind.headers}
