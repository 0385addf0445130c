"""Admission control: bounds on the requests that wait. Those that run are bounded by the engine.

Among tenants, the queue is shared by dynamic thresholds (Choudhury and Hahne 1998, "Dynamic queue length thresholds for
shared-memory packet switches"): a tenant may have as much unfinished as the queue still has room for. So one that
floods it leaves half of it to others, two leave a third, and nobody has to say beforehand how many there are.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from server.config import LimitsConfig
from server.errors import ApiError, bad_request
from server.generation.tenant_terms import NO_TERMS, TermsOf, TokenQuotas
from server.telemetry.request_timeline import Ahead

if TYPE_CHECKING:
    from engine.client.client import EngineClient

MAX_RETRY_AFTER = 60.0  # seconds; the OpenAI SDKs ignore longer ones
MIN_FAR_RETRY_AFTER = 10.0  # seconds, of those whose place would come later than that; spread, so that few collide
SLACK = 1.25  # places are this much further apart than the queue drains, for clients that come a little early
GUESSED_RATE = 2.0  # requests per second, before anything was measured
GUESS_SECONDS = 0.5  # how much measured time the guess counts for
STARTING_RETRY_AFTER = 2.0
SURE = 2.33  # standard deviations of a wait, so that 99 of 100 are no longer
FRESH_SECONDS = 1.0  # of a queue: who waits longer beside free seats does not wait for a seat
DRAINING_RETRY_AFTER = 5.0  # for the load balancer to choose another server, or for the next one to start
FAILED_RETRY_AFTER = 30.0


class DrainRate:
    """How many requests per second make room for others that wait: the rate at which a queue drains.

    Measured while requests wait, in a window of so many seconds of such time that fades exponentially: what an idle
    server does says nothing of what it could do. It begins as a guess, of which so much stays in it that a request
    which ends at once does not look like a thousand per second.
    """

    def __init__(self, *, window: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window
        self._clock = clock
        self._num_ends = 0.0  # exponentially fading, as `_seconds`
        self._seconds = 0.0
        self._seen_at = 0.0
        self._did_wait = False

    def watch(self, *, waited: bool, waits: bool) -> None:
        """Adds the time since the last call, if requests waited in it. `waits`: whether some wait from now on."""
        now = self._clock()
        if self._did_wait and waited:
            fade = math.exp(-(now - self._seen_at) / self._window)
            self._num_ends *= fade
            self._seconds = self._seconds * fade + self._window * (1 - fade)
        self._seen_at, self._did_wait = now, waits

    def count(self) -> None:
        """Counts a request that left the engine while others waited."""
        self._num_ends += 1.0

    def per_second(self) -> float:
        return (self._num_ends + GUESSED_RATE * GUESS_SECONDS) / (self._seconds + GUESS_SECONDS)

    def cautious_seconds(self) -> float:
        """Seconds between two requests that leave the queue, rounded up: the more, the fewer ends were seen."""
        return (SLACK + 1.0 / (1.0 + self._num_ends)) / self.per_second()


class Residence:
    """For how many seconds requests occupy a seat, from the first step to the last; the newest count most."""

    def __init__(self, *, num_remembered: float = 32.0) -> None:
        self._forgetting = 1.0 / num_remembered
        self._num_seen = 0
        self._mean = self._mean_square = 0.0

    def note(self, seconds: float) -> None:
        self._num_seen += 1
        share = max(self._forgetting, 1.0 / self._num_seen)
        self._mean += share * (seconds - self._mean)
        self._mean_square += share * (seconds**2 - self._mean_square)

    @property
    def short(self) -> float:
        """That of the shorter ones, a standard deviation below the mean; 0 while nothing has ended."""
        return max(self._mean - math.sqrt(max(self._mean_square - self._mean**2, 0.0)), 0.0)


class Place:
    """Room in the queue for the choices of one request. A context manager that spans the request's life: what no choice
    has taken is given back at its end."""

    def __init__(self, admission: Admission, tenant: str, num_requests: int, num_tokens: int, *, ahead: Ahead) -> None:
        """ahead: who was there before"""
        self.ahead = ahead
        self._admission = admission
        self._tenant, self._unfinished = tenant, (num_requests, num_tokens)
        self._num_requests = num_requests
        self._num_tokens = num_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release(self._num_requests, self._num_tokens)
        self._admission.note_finished(self, self._tenant, *self._unfinished)

    def hand_over(self, num_tokens: int) -> None:
        """Notes that the engine gets a choice in this iteration of the event loop, and counts it itself."""
        self._release(1, num_tokens)

    def end(self, seconds: float | None = None) -> None:
        """Notes that a choice that was handed over has left the engine.

        seconds: that it was in its seat, of one that ended by itself
        """
        self._admission.note_end(seconds)

    def charge_output(self, num_tokens: int) -> None:
        """Notes how long the answers became."""
        self._admission.charge_output(self._tenant, num_tokens)

    def _release(self, num_requests: int, num_tokens: int) -> None:
        self._num_requests -= num_requests
        self._num_tokens -= num_tokens
        self._admission.release(num_requests, num_tokens)


class BackgroundPlace(Place):
    """The place of a request that nobody waits for: it takes none from those whose sender does."""

    def __exit__(self, *_: object) -> None:
        """It was not counted."""

    def hand_over(self, num_tokens: int) -> None:
        """It was not counted."""

    def end(self, seconds: float | None = None) -> None:
        """It says nothing of how fast the queue drains, which it is no part of."""


def _most_within(mean: float) -> float:
    """The largest k of which k + SURE * sqrt(k) <= mean."""
    return ((math.sqrt(SURE**2 + 4.0 * mean) - SURE) / 2.0) ** 2


class Admission:
    """Refuses what the queue has no room for, and everything while the server cannot generate.

    An admitted request counts as waiting from its admission on, before the engine hears of it. A refused one gets a
    Retry-After of its own, behind those that were refused before: they are as far apart as the queue drains.
    """

    def __init__(
        self,
        engine: EngineClient,
        limits: LimitsConfig,
        drain_rate: DrainRate,
        *,
        is_shared: Callable[[], bool] = lambda: False,
        terms_of: TermsOf = lambda _: NO_TERMS,
        num_seats: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """is_shared: whether there is more than one tenant. num_seats: choices that may run at once, 0 if unknown"""
        self._engine = engine
        self._limits = limits
        self._drain_rate = drain_rate
        self._clock = clock
        self._num_reserved = 0  # admitted, and not with the engine yet
        self._num_reserved_tokens = 0
        self._is_shared = is_shared
        self._terms_of = terms_of
        self._quotas = TokenQuotas(terms_of, clock=clock)
        self._unfinished: Counter[str] = Counter()  # choices by tenant, waiting or running
        self._unfinished_tokens: Counter[str] = Counter()  # their prompts' tokens
        self._places: list[tuple[float, int]] = []  # a heap: when a refused request may come again, and its choices
        self._num_placed = 0  # of all of them
        self._num_seats = num_seats
        self._residence = Residence()
        self._admitted_at: dict[Place, float] = {}  # of all that are unfinished, the oldest first
        self._waits_since = 0.0
        self._is_closed = False

    def close(self) -> None:
        self._is_closed = True

    def check_available(self) -> None:
        """Raises ApiError 503 while the server cannot generate. A restarting engine keeps its queue, so it can."""
        if self._is_closed:
            raise ApiError(
                503,
                "the server is shutting down and takes no new requests; try another server, or this one later",
                code="draining",
                retry_after=DRAINING_RETRY_AFTER,
            )
        state = self._engine.state
        if state == "starting":
            phase = f"{self._engine.phase or 'starting'} {self._engine.phase_detail}".rstrip()
            raise ApiError(
                503,
                f"the model is still loading ({phase}); GET /readyz tells when it is ready",
                code="starting",
                retry_after=STARTING_RETRY_AFTER,
            )
        if state in ("failed", "stopped"):
            failure = self._engine.failure
            raise ApiError(
                503,
                f"the engine has stopped ({failure.kind}); the server must be restarted"
                if failure
                else "the engine has stopped",
                code="engine_down",
                retry_after=FAILED_RETRY_AFTER,
            )

    @property
    def num_waiting(self) -> int:
        """Choices that wait in the engine, and those that were admitted but not handed over yet. Those of background
        requests are left out: all others come before them."""
        return self._engine.num_waiting - self._engine.num_background_waiting + self._num_reserved

    @property
    def num_waiting_tokens(self) -> int:
        engine = self._engine
        return engine.num_waiting_tokens - engine.num_background_waiting_tokens + self._num_reserved_tokens

    def admit_background(self, num_requests: int, num_tokens: int, tenant: str = "") -> Place:
        """Gives a request that nobody waits for a place: there is always one, as its sender has few at once.

        Raises ApiError: 400 where it can never run, 429 where the tenant's quota of tokens is used up, 503 as `admit`.
        """
        self.check_available()
        self.check_size(num_requests, num_tokens)
        self._quotas.check(tenant)
        self._quotas.charge(tenant, num_tokens)
        engine = self._engine
        ahead = Ahead(engine.num_waiting, engine.num_waiting_tokens, engine.num_running)
        return BackgroundPlace(self, tenant, num_requests, num_tokens, ahead=ahead)

    def check_size(self, num_requests: int, num_tokens: int) -> None:
        """Raises ApiError 400 for what even an empty queue has no room for: sending it again would not help."""
        limits = self._limits
        if num_requests > limits.max_queued_requests:
            raise bad_request(
                f"the request asks for {num_requests} choices (prompts times n), more than the "
                f"{limits.max_queued_requests} that limits.max_queued_requests lets wait; send fewer at once",
                param="n",
            )
        if num_tokens > limits.max_queued_tokens:
            raise bad_request(
                f"the request has {num_tokens} prompt tokens (each prompt n times), more than the "
                f"{limits.max_queued_tokens} that limits.max_queued_tokens lets wait; send fewer at once",
                param="prompt",
            )

    def admit(self, num_requests: int, num_tokens: int, tenant: str = "") -> Place:
        """Gives `num_requests` sequences of together `num_tokens` prompt tokens a place, or raises ApiError.

        400: it can never have one; 429: not now; 503: the server cannot generate.
        """
        self.check_available()
        self.check_size(num_requests, num_tokens)
        self.check_room(tenant, num_requests, num_tokens)
        waiting, waiting_tokens = self.num_waiting, self.num_waiting_tokens
        self._num_reserved += num_requests
        self._num_reserved_tokens += num_tokens
        self._unfinished[tenant] += num_requests
        self._unfinished_tokens[tenant] += num_tokens
        self._quotas.charge(tenant, num_tokens)
        self._drain_rate.watch(waited=waiting > 0, waits=True)
        ahead = Ahead(waiting, waiting_tokens, self._engine.num_running)
        place = Place(self, tenant, num_requests, num_tokens, ahead=ahead)
        self._admitted_at[place] = self._clock()
        return place

    def check_room(self, tenant: str, num_requests: int = 1, num_tokens: int = 1) -> None:
        """Raises ApiError 429 where there is no room for so much now; by default, for the smallest request there is."""
        waiting, waiting_tokens = self.num_waiting, self.num_waiting_tokens
        self._drain_rate.watch(waited=waiting > 0, waits=waiting > 0)
        if not waiting:
            self._waits_since = self._clock()
        limit = self._limits.max_queued_requests
        if waiting + num_requests > limit:
            raise ApiError(
                429,
                f"{waiting} requests wait, {num_requests} more would pass limits.max_queued_requests ({limit}); "
                "try again later",
                retry_after=self._seconds_to_place(num_requests, waiting + num_requests - limit),
            )
        limit = self._limits.max_queued_tokens
        if waiting_tokens + num_tokens > limit:
            excess = (waiting_tokens + num_tokens - limit) * waiting / max(waiting_tokens, 1)
            raise ApiError(
                429,
                f"{waiting_tokens} prompt tokens wait, {num_tokens} more would pass limits.max_queued_tokens "
                f"({limit}); try again later",
                retry_after=self._seconds_to_place(num_requests, max(excess, 1.0)),
            )
        self._quotas.check(tenant)
        if self._is_shared():
            self._check_share(tenant, num_requests, num_tokens)
        self._check_wait(tenant, num_requests)

    def _check_share(self, tenant: str, num_requests: int, num_tokens: int) -> None:
        """Raises ApiError 429 where a tenant has more unfinished than the queue has room for. One request at a time is
        never refused: it is bounded by the queue alone."""
        own, own_tokens = self._unfinished[tenant], self._unfinished_tokens[tenant]
        if not own:
            return
        room = self._limits.max_queued_requests - self.num_waiting
        room_tokens = self._limits.max_queued_tokens - self.num_waiting_tokens
        if own + num_requests <= room and own_tokens + num_tokens <= room_tokens:
            return
        raise ApiError(
            429,
            f"{own} requests of this API key are unfinished, of {own_tokens} prompt tokens; with this one they would "
            f"be more than the {room} requests and {room_tokens} tokens that the queue, which others share, has room "
            "for; try again when some have ended",
            code="share_full",
            retry_after=self._seconds_to_place(num_requests, max((own + num_requests - room) / 2, 1.0)),
        )

    def _check_wait(self, tenant: str, num_requests: int) -> None:
        """Raises ApiError 429 where, as fast as the queue has drained lately, the wait may be beyond the limit.

        Ends come as they like, about so many per second: the k-th from now in (k + `SURE` * sqrt(k)) / rate, or sooner.
        """
        limit, free = self._limits.max_queue_seconds, self._num_free_seats()
        place = self._place_in_queue(tenant, num_requests)
        position = place - free  # among those that wait until others end
        if limit is None or position <= 0:
            return
        lull, rate = self._seconds_of_lull(), self._drain_rate.per_second()
        room = _most_within(max(limit - lull, 0.0) * rate)
        if lull <= limit and position <= max(room, num_requests):  # one may always wait, so that no seat is idle
            return
        seconds = lull + (position + SURE * math.sqrt(position)) / rate
        raise ApiError(
            429,
            f"{self.num_waiting} requests wait, and one more would for up to {seconds:.1f} s, longer than "
            f"limits.max_queue_seconds ({limit:g}); try again later",
            retry_after=self._seconds_to_place(num_requests, max(position - room, 1.0)),
        )

    def _place_in_queue(self, tenant: str, num_requests: int) -> float:
        """How many will have started when the last choice of one more request has. Tenants are served in turns, by
        their weights: one that floods the queue is not ahead of the others."""
        at_most = self.num_waiting + num_requests
        if not self._is_shared():
            return at_most
        others = sum(self._terms_of(other).weight for other in self._unfinished if other != tenant)
        in_turns = (self._unfinished[tenant] + num_requests) * (1.0 + others / self._terms_of(tenant).weight)
        return min(at_most, in_turns)

    def _num_free_seats(self) -> int:
        """Seats that those who wait will have in the next step. 0 where they have waited beside free ones, and so wait
        for other things: for memory, or for the turn of their prompts."""
        if self._clock() - self._waits_since > FRESH_SECONDS:
            return 0
        return max(self._num_seats() - self._engine.num_running, 0)

    def _seconds_of_lull(self) -> float:
        """Seconds until requests begin to end, where all of those that run have begun together, as after a burst: until
        then a rate that was measured before says nothing."""
        oldest = next(iter(self._admitted_at.values()), None)
        return 0.0 if oldest is None else max(self._residence.short - (self._clock() - oldest), 0.0)

    def charge_output(self, tenant: str, num_tokens: int) -> None:
        """Called by `Place`: so many tokens were answered."""
        self._quotas.charge(tenant, num_tokens)

    def note_finished(self, place: Place, tenant: str, num_requests: int, num_tokens: int) -> None:
        """Called by `Place`: a request of so many choices has left."""
        self._admitted_at.pop(place, None)
        self._unfinished[tenant] -= num_requests
        self._unfinished_tokens[tenant] -= num_tokens
        if not self._unfinished[tenant]:
            del self._unfinished[tenant], self._unfinished_tokens[tenant]

    def release(self, num_requests: int, num_tokens: int) -> None:
        """Called by `Place`: so much of what was admitted was handed to the engine, or never will be."""
        self._num_reserved -= num_requests
        self._num_reserved_tokens -= num_tokens

    def note_end(self, seconds: float | None) -> None:
        """Called by `Place`: a choice has left the engine, after so many seconds in its seat."""
        if seconds is not None:
            self._residence.note(seconds)
        waits = self.num_waiting > 0
        self._drain_rate.watch(waited=waits, waits=waits)
        if waits:
            self._drain_rate.count()

    def _seconds_to_place(self, num_requests: int, num_excess: float) -> float:
        """Seconds until a refused request may come again: behind all that were refused before it and have yet to come.

        num_excess: requests that must leave the queue before there is room. Some clients read whole seconds only, so no
        more requests are told the same second than the queue can take at once. One whose turn lies beyond
        MAX_RETRY_AFTER gets a random time before that instead, and is placed when it comes again.
        """
        now = self._clock()
        while self._places and self._places[0][0] <= now:
            self._num_placed -= heapq.heappop(self._places)[1]
        spacing = max(self._drain_rate.cautious_seconds(), 1.0 / self._limits.max_queued_requests)
        seconds = self._seconds_of_lull() + (self._num_placed + num_excess) * spacing
        if seconds > MAX_RETRY_AFTER:
            return random.uniform(MIN_FAR_RETRY_AFTER, MAX_RETRY_AFTER)
        heapq.heappush(self._places, (now + seconds, num_requests))
        self._num_placed += num_requests
        return seconds
