"""The record of one generation request, for the metrics and its line in the log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from starlette.datastructures import State
from starlette.requests import ClientDisconnect

from engine.types import RequestTiming
from server.errors import ApiError
from server.telemetry.metrics import Metrics
from server.telemetry.token_counts import TokenCounts

REFUSED = {408: "timeout", 429: "rejected", 500: "error", 503: "rejected"}  # other client errors are "invalid"
BROKEN_OFF = {400: "invalid", 408: "timeout", 409: "abort"}  # all else is "error"


class RunningRequest(Protocol):
    """The interface of a running request to its record: its limits at the start, its counts at the end."""

    @property
    def choices_per_prompt(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    def counts(self) -> TokenCounts: ...

    def engine_timing(self) -> RequestTiming | None:
        """Of the choice that ended last; None where the engine gave none."""
        ...


class RequestRecord:
    """Counts a request as arrived, and as finished exactly once, whatever becomes of it.

    A context manager around the handler, for what fails before there is anything to run; a generation that has begun
    takes over with `running`, because it may outlive the handler.
    """

    def __init__(self, metrics: Metrics, request_state: State) -> None:
        """`request_state` gets `log_fields` when the request is over, for its line in the log."""
        self.started_at = time.monotonic()
        self.outcome = "abort"  # unless somebody knows better
        self._request_state = request_state
        self._metrics = metrics
        self._is_taken_over = False
        self._is_over = False
        metrics.request_arrived()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_taken_over or self._is_over:
            return
        self._is_over = True
        self.outcome = _outcome_of(error, REFUSED, "invalid")
        self._metrics.request_rejected(self.outcome)
        self._tell_log(TokenCounts())

    @contextmanager
    def running(self, request: RunningRequest) -> Iterator[None]:
        """Around the generation of an answer: however it is left, the request is finished."""
        self._is_taken_over = True
        self._metrics.request_started(request.choices_per_prompt, request.max_tokens)
        try:
            yield
        except Exception as error:
            self.outcome = _outcome_of(error, BROKEN_OFF, "error")
            raise
        finally:
            self._is_over = True
            counts = request.counts()
            seconds = time.monotonic() - self.started_at
            self._metrics.request_finished(self.outcome, counts, seconds, request.engine_timing())
            self._tell_log(counts)

    def first_token(self) -> None:
        self._metrics.first_token(time.monotonic() - self.started_at)

    def tokens(self, num_tokens: int, previous_at: float | None, now: float | None) -> None:
        """Tokens of one choice, and when it had some before; both times in seconds, time.monotonic."""
        if num_tokens and now is not None:
            self._metrics.tokens_delivered(num_tokens, now - previous_at if previous_at is not None else None)

    def _tell_log(self, counts: TokenCounts) -> None:
        self._request_state.log_fields = (
            f"outcome={self.outcome} prompt_tokens={counts.num_prompt_tokens} "
            f"cached_tokens={counts.num_cached_tokens} output_tokens={counts.num_output_tokens} "
            f"accepted_drafts={counts.num_accepted_drafts}"
        )


def _outcome_of(error: BaseException | None, by_status: dict[int, str], otherwise: str) -> str:
    if isinstance(error, ApiError):
        return by_status.get(error.status, otherwise)
    is_error = isinstance(error, Exception) and not isinstance(error, ClientDisconnect)
    return "error" if is_error else "abort"  # a client that left in the middle of an answer raises nothing, or cancels
