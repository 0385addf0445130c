"""Clients' own books: what became of each request, beside the text that it should have had."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loadtest.client.client import Client, Target
from loadtest.client.outcome import Answer, Failure, FailureKind
from loadtest.workload.prompts import Exchange

BREAKS = frozenset({FailureKind.DISCONNECT, FailureKind.CONNECT, FailureKind.CUT})
"""Ends that every client takes for a failure, though no error was told."""


@dataclass
class Account:
    """What became of requests that were sent. Each is in one of: answered, wrong, refused, failed, broken.

    refused: by status, before anything was computed. failed: an error was told, in an answer or in a stream.
    broken: the connection ended, or none came about. wrong: a text that is not the one of an undisturbed run, or a
    stream that is none by the protocol. examples: the first of each kind
    """

    num_sent: int = 0
    num_answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def num_ended(self) -> int:
        parts = (self.refused, self.failed, self.broken, self.wrong)
        return self.num_answered + sum(part.total() for part in parts)

    def enter(self, outcome: Answer | Failure, expected: str | None) -> None:
        """expected: the text; None where any will do"""
        if isinstance(outcome, Answer):
            if expected is not None and outcome.text != expected:
                self._enter_failure(self.wrong, "another text", f"{outcome.text[:80]!r}, not {expected[:80]!r}")
                return
            self.num_answered += 1
            self.answers.append(outcome)
            return
        kind, detail = outcome.kind, outcome.detail
        if kind in ("http_429", "http_503"):
            self._enter_failure(self.refused, kind, detail)
        elif kind.startswith("http_") or kind == FailureKind.ERROR_EVENT:
            self._enter_failure(self.failed, kind, detail)
        elif kind in BREAKS:
            self._enter_failure(self.broken, kind, detail)
        else:
            self._enter_failure(self.wrong, kind, detail)

    def _enter_failure(self, part: Counter[str], kind: str, detail: str) -> None:
        part[kind] += 1
        if part[kind] == 1:
            self.examples.append(f"{kind}: {detail[:200]}")

    def line(self) -> str:
        """All of it in a line."""
        parts = [f"{self.num_sent} sent, {self.num_answered} answered as they should be"]
        for name in ("refused", "failed", "broken", "wrong"):
            kinds: Counter[str] = getattr(self, name)
            if kinds:
                parts.append(f"{name}: {', '.join(f'{number} {kind}' for kind, number in kinds.items())}")
        return "; ".join(parts)


class Crowd:
    """Clients that ask the same few things again and again, greedily, and know the answers."""

    def __init__(self, target: Target, exchanges: Sequence[Exchange], *, num_clients: int) -> None:
        self.target = target
        self.account = Account()
        self.exchanges = exchanges
        self._num_clients = num_clients
        self.texts: dict[int, str] = {}  # by the number of the exchange

    async def learn(self) -> None:
        """Asks everything once, undisturbed: these are the texts that all answers must have. Raises RuntimeError."""
        async with Client(self.target) as client:
            for index, exchange in enumerate(self.exchanges):
                outcome = await client.send(exchange)
                if not isinstance(outcome, Answer):
                    raise RuntimeError(f"an undisturbed request failed: {outcome.kind}: {outcome.detail}")
                self.texts[index] = outcome.text

    @property
    def num_learned(self) -> int:
        return len(self.texts)

    async def run(self, is_over: Callable[[], bool]) -> Account:
        """Sends until it is over, and waits for what is on its way."""
        async with Client(self.target) as client:
            await asyncio.gather(*(self._send_in_turn(client, is_over) for _ in range(self._num_clients)))
        return self.account

    async def run_for(self, seconds: float) -> Account:
        deadline = time.monotonic() + seconds
        return await self.run(lambda: time.monotonic() > deadline)

    async def ask_each_once(self) -> Account:
        """Everything once more, all at once."""
        async with Client(self.target) as client:
            await asyncio.gather(*(self._send(client, index) for index in range(len(self.exchanges))))
        return self.account

    async def _send_in_turn(self, client: Client, is_over: Callable[[], bool]) -> None:
        while not is_over():
            answered = self.account.num_answered
            await self._send(client, self.account.num_sent % len(self.exchanges))
            if self.account.num_answered == answered:
                await asyncio.sleep(0.05)  # a server that is away is not asked a thousand times a second

    async def _send(self, client: Client, index: int) -> None:
        self.account.num_sent += 1
        self.account.enter(await client.send(self.exchanges[index]), self.texts.get(index))
