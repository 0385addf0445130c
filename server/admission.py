"""Who may enter the queue. The bounds are on what waits; what runs is bounded by the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from server.config import LimitsConfig
from server.errors import ApiError

if TYPE_CHECKING:
    from engine.client import EngineClient

MAX_RETRY_AFTER = 60.0  # seconds; the OpenAI SDKs ignore longer ones
UNKNOWN_DRAIN_RETRY_AFTER = 5.0  # seconds, while nothing has left the queue yet
STARTING_RETRY_AFTER = 2.0
DRAINING_RETRY_AFTER = 5.0  # for the load balancer to choose another server, or for the next one to start
FAILED_RETRY_AFTER = 30.0


class DrainRate:
    """How many requests leave the queue per second: events weighted by exp(-age / window)."""

    def __init__(self, *, window: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window
        self._clock = clock
        self._weight = 0.0  # of all events, at `_updated_at`
        self._updated_at = 0.0
        self._first_at: float | None = None

    def count(self) -> None:
        """A request left the queue."""
        now = self._clock()
        if self._first_at is None:
            self._first_at = now
        self._weight = self._weight_at(now) + 1.0
        self._updated_at = now

    def per_second(self) -> float:
        """0 before the first event. Right after it the window is young, so its weight is scaled up to a full one."""
        if self._first_at is None:
            return 0.0
        now = self._clock()
        age = max(now - self._first_at, 1.0)
        return self._weight_at(now) / (self._window * (1.0 - math.exp(-age / self._window)))

    def _weight_at(self, now: float) -> float:
        return self._weight * math.exp(-(now - self._updated_at) / self._window)


class Admission:
    """Refuses what the queue has no room for, and everything while the server cannot generate.

    An empty queue takes any request that is within its own limits: sending it again would not make it smaller.
    """

    def __init__(self, engine: EngineClient, limits: LimitsConfig, drain_rate: DrainRate) -> None:
        self._engine = engine
        self._limits = limits
        self._drain_rate = drain_rate
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

    def admit(self, num_requests: int, num_tokens: int) -> None:
        """Lets `num_requests` sequences of together `num_tokens` prompt tokens in, or raises ApiError 429 or 503."""
        self.check_available()
        waiting, waiting_tokens = self._engine.num_waiting, self._engine.num_waiting_tokens
        if waiting == 0:
            return
        limit = self._limits.max_queued_requests
        if waiting + num_requests > limit:
            raise ApiError(
                429,
                f"{waiting} requests wait, {num_requests} more would pass limits.max_queued_requests ({limit}); "
                "try again later",
                retry_after=self._seconds_until(waiting + num_requests - limit),
            )
        limit = self._limits.max_queued_tokens
        if waiting_tokens + num_tokens > limit:
            excess = (waiting_tokens + num_tokens - limit) * waiting / max(waiting_tokens, 1)
            raise ApiError(
                429,
                f"{waiting_tokens} prompt tokens wait, {num_tokens} more would pass limits.max_queued_tokens "
                f"({limit}); try again later",
                retry_after=self._seconds_until(excess),
            )

    def _seconds_until(self, num_requests: float) -> float:
        """When so many requests will have left the queue, at the measured rate."""
        rate = self._drain_rate.per_second()
        if rate <= 0.0:
            return UNKNOWN_DRAIN_RETRY_AFTER
        return min(max(num_requests, 1.0) / rate, MAX_RETRY_AFTER)
