"""The timeline of one request, which `explanation` tells in words, and the history that keeps those of the latest."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.types import RequestTiming
from server.telemetry.token_counts import TokenCounts

NUM_REQUESTS = 1_000
MAX_PROMPT_TOKENS = 65_536  # of a prompt, that are kept to be compared with others
MAX_KEPT_TOKENS = 4_194_304  # of all prompts together: 16 MiB


@dataclass(frozen=True, slots=True)
class Ahead:
    """Who was there when a request came: choices that waited, their prompt tokens, and choices that ran."""

    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_running: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """What is known of a request once the queue has taken it.

    needs_all: what of the request needs every token of the prompt computed, so that nothing is reused; "": nothing
    """

    response_id: str
    cache_salt: str
    num_prompt_tokens: int  # each prompt counted once
    num_choices: int
    ahead: Ahead
    needs_all: str = ""


class RunningRequest(Protocol):
    """The interface of a running request to its record: its limits at the start, its counts at the end."""

    @property
    def choices_per_prompt(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """Of its first prompt."""
        ...

    def admitted(self, ahead: Ahead) -> Admitted: ...

    @property
    def num_restarts(self) -> int:
        """Of the engine, since the request was made."""
        ...

    def counts(self) -> TokenCounts: ...

    def first_timing(self) -> RequestTiming | None:
        """Of the choice that had the first token; None where the engine gave none."""
        ...

    def engine_timing(self) -> RequestTiming | None:
        """Of the choice that ended last; None where the engine gave none."""
        ...


@dataclass(eq=False, slots=True)
class Timeline:
    """One HTTP request for text, from its arrival. Written as things happen; times in seconds, time.monotonic.

    status: of the answer, or of the error that ended a stream. pause: the longest between two tokens of a choice, as
    its beginning and its length.
    """

    request_id: str
    tenant: str
    arrived_at: float
    admitted: Admitted | None = None
    admitted_at: float | None = None
    first_token_at: float | None = None
    first_timing: RequestTiming | None = None  # of the choice that had the first token, up to that
    pause: tuple[float, float] = (0.0, 0.0)
    ended_at: float | None = None
    outcome: str = ""
    status: int | None = None
    error: str = ""
    counts: TokenCounts = field(default_factory=TokenCounts)
    timing: RequestTiming | None = None  # of the choice that ended last
    num_restarts: int = 0  # of the engine, while it was there
    prompt: array[int] = field(default_factory=lambda: array("i"))  # the beginning of its first
    running: RunningRequest | None = None  # while it runs

    @property
    def response_id(self) -> str:
        return self.admitted.response_id if self.admitted is not None else ""

    @property
    def num_choices(self) -> int:
        return self.admitted.num_choices if self.admitted is not None else 0

    def admit(self, request: RunningRequest, ahead: Ahead, now: float) -> None:
        """Notes that the queue has taken it, behind those who were ahead."""
        self.running, self.admitted_at = request, now
        self.admitted = request.admitted(ahead)
        self.prompt = array("i", request.prompt_token_ids[:MAX_PROMPT_TOKENS])

    def begin_answer(self, now: float) -> None:
        assert self.running is not None
        self.first_token_at, self.first_timing = now, self.running.first_timing()

    def refresh(self) -> None:
        """Takes over what a request that runs has counted so far."""
        if self.running is not None:
            self.counts, self.timing = self.running.counts(), self.running.engine_timing()
            self.num_restarts = self.running.num_restarts

    def end(self, outcome: str, status: int, now: float) -> None:
        self.refresh()
        self.running = None
        self.outcome, self.status, self.ended_at = outcome, status, now


class RequestHistory:
    """The latest requests: so many that were admitted, those that run included, and as many that were refused.

    Refusals are kept apart, so that a client that is turned away a thousand times does not push out what ran.
    """

    def __init__(self, num_requests: int = NUM_REQUESTS, *, max_kept_tokens: int = MAX_KEPT_TOKENS) -> None:
        self._admitted: deque[Timeline] = deque()
        self._refused: deque[Timeline] = deque(maxlen=num_requests)
        self._num_requests = num_requests
        self._max_kept_tokens = max_kept_tokens
        self._num_kept_tokens = 0  # of prompts
        self._num_without_prompt = 0  # the oldest, whose prompts were let go

    def add(self, timeline: Timeline) -> None:
        """Adds one that was admitted, when it is."""
        self._admitted.append(timeline)
        self._num_kept_tokens += len(timeline.prompt)
        if len(self._admitted) > self._num_requests:
            self._num_kept_tokens -= len(self._admitted.popleft().prompt)
            self._num_without_prompt = max(self._num_without_prompt - 1, 0)
        while self._num_kept_tokens > self._max_kept_tokens and self._num_without_prompt < len(self._admitted) - 1:
            oldest = self._admitted[self._num_without_prompt]
            self._num_kept_tokens -= len(oldest.prompt)
            oldest.prompt = array("i")
            self._num_without_prompt += 1

    def add_refused(self, timeline: Timeline) -> None:
        self._refused.append(timeline)

    def find(self, request_id: str, *, tenant: str | None) -> Timeline | None:
        """The latest request that answered or was asked for under this id. tenant: whose; None: anybody's"""
        latest: Timeline | None = None
        for timelines in (self._admitted, self._refused):
            own = (each for each in reversed(timelines) if tenant in (None, each.tenant))
            found = next((each for each in own if request_id in (each.request_id, each.response_id)), None)
            if found is not None and (latest is None or found.arrived_at > latest.arrived_at):
                latest = found
        return latest

    def __iter__(self) -> Iterator[Timeline]:
        """Those that were admitted, the oldest first."""
        return iter(list(self._admitted))

    def longest_shared_prefix(self, timeline: Timeline) -> tuple[int, Timeline | None]:
        """Tokens that its prompt begins with as an earlier one does, and that one; only of the same cache salt."""
        longest, closest = 0, None
        for other in self._admitted:
            if other is timeline:
                break
            if other.admitted is None or timeline.admitted is None:
                continue
            if other.admitted.cache_salt == timeline.admitted.cache_salt:
                length = _num_shared(timeline.prompt, other.prompt)
                if length and length >= longest:  # of several the latest
                    longest, closest = length, other
        return longest, closest


def _num_shared(first: array[int], second: array[int]) -> int:
    """Length of the longest common prefix, by halving: slices are compared in C."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
