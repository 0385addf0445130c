"""Clients that send one request after the other, and an account of what became of each."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import httpx

Kind = Literal["stream", "whole", "large"]
KINDS: tuple[Kind, ...] = ("stream", "whole", "stream", "large")  # in turns; a large one is streamed or not, in turns
LARGE_BODY = 100_000  # bytes
NUM_PROMPTS = 8
DONE = b"data: [DONE]"


@dataclass(frozen=True, slots=True)
class Loss:
    """A request that did not get the answer it should have. has_begun: some of the answer had come."""

    kind: Kind
    has_begun: bool
    reason: str
    at: float  # seconds since the traffic began


@dataclass
class Account:
    """What became of all requests: when the traffic is over, `num_sent` are answered or lost."""

    num_sent: int = 0
    answered: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stream", "whole", "large"), 0))
    losses: list[Loss] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)  # of streams

    @property
    def num_answered(self) -> int:
        return sum(self.answered.values())


class _LostError(Exception):
    """The answer is not what it should be."""


class Traffic:
    """`num_clients` clients, each of which sends its next request when the last has ended, until `enough` says so.

    Every prompt has a seed, so that all replicas must answer it with the same text: the first answer's.
    """

    def __init__(self, url: str, model: str, *, num_clients: int, max_tokens: int) -> None:
        self.account = Account()
        self._url = url
        self._model = model
        self._num_clients = num_clients
        self._max_tokens = max_tokens
        self._texts: dict[int, str] = {}
        self._began = time.monotonic()

    async def run(self, enough: Callable[[], bool]) -> None:
        limits = httpx.Limits(max_connections=self._num_clients, max_keepalive_connections=self._num_clients)
        async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._send_in_turn(client, enough) for _ in range(self._num_clients)))

    async def _send_in_turn(self, client: httpx.AsyncClient, enough: Callable[[], bool]) -> None:
        while not enough():
            number = self.account.num_sent
            self.account.num_sent += 1
            await self.send(client, number)

    async def send(self, client: httpx.AsyncClient, number: int) -> None:
        """Sends a request and enters it into the account."""
        kind = KINDS[number % len(KINDS)]
        is_streamed = kind == "stream" or (kind == "large" and number // len(KINDS) % 2 == 0)
        prompt = number % NUM_PROMPTS
        received = bytearray()
        try:
            text = await self._ask(client, prompt, received, is_streamed=is_streamed, is_large=kind == "large")
            if text != self._texts.setdefault(prompt, text):
                raise _LostError(f"prompt {prompt} was answered with another text than before")
        except (_LostError, httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            reason = str(error) or type(error).__name__
            seconds = round(time.monotonic() - self._began, 3)
            self.account.losses.append(Loss(kind, bool(received), reason[:300], seconds))
        else:
            self.account.answered[kind] += 1

    async def _ask(
        self, client: httpx.AsyncClient, prompt: int, received: bytearray, *, is_streamed: bool, is_large: bool
    ) -> str:
        """The answer's text. `received` fills with its bytes as they come, those of errors excepted."""
        body = {
            "model": self._model,
            "prompt": f"Question {prompt}: what is {prompt} and {prompt}?",
            "max_tokens": self._max_tokens,
            "ignore_eos": True,
            "seed": prompt,
            "stream": is_streamed,
        }
        content = json.dumps(body).encode()
        if is_large:
            content = content[:-1] + b" " * (LARGE_BODY - len(content)) + b"}"
        began = time.monotonic()
        headers = {"Content-Type": "application/json"}
        async with client.stream("POST", "/v1/completions", content=content, headers=headers) as response:
            if response.status_code != 200:
                reason = (await response.aread()).decode(errors="replace")
                raise _LostError(f"status {response.status_code}: {reason}")
            async for piece in response.aiter_bytes():
                if is_streamed and not received:
                    self.account.first_token_seconds.append(time.monotonic() - began)
                received += piece
        return _streamed_text(bytes(received)) if is_streamed else str(json.loads(received)["choices"][0]["text"])


def _streamed_text(answer: bytes) -> str:
    """The text of a stream's events. Raises _LostError where it is not whole."""
    *lines, last = [line for line in answer.splitlines() if line.startswith(b"data: ")] or [b""]
    if last != DONE:
        raise _LostError("the stream ended without [DONE]")
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    for event in events:
        if "error" in event:
            raise _LostError(f"an error within the stream: {event['error']}")
    return "".join(choice["text"] for event in events for choice in event["choices"])
