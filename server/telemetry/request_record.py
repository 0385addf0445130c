"""The record of one generation request, for the metrics and its line in the log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from starlette.datastructures import State
from starlette.requests import ClientDisconnect

from server.errors import ApiError
from server.telemetry.metrics import REFUSED, Metrics
from server.telemetry.request_timeline import Ahead, RequestHistory, RunningRequest, Timeline
from server.telemetry.token_counts import TokenCounts

BROKEN_OFF = {400: "invalid", 408: "timeout", 409: "abort"}  # all else is "error"
MAX_ERROR_CHARACTERS = 1_000  # that are remembered: some name what a client sent
IS_COUNTED = "is_counted"  # the key of a request's state that says that it is in the metrics
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; logs, metrics and explanations do


class RequestRecord:
    """Counts a request as arrived, and as finished exactly once, whatever becomes of it.

    A context manager around the handler, for what fails before there is anything to run; a generation that has begun
    takes over with `running`, because it may outlive the handler.
    """

    def __init__(self, metrics: Metrics, history: RequestHistory, request_state: State) -> None:
        """`request_state` gets `log_fields` when the request is over, for its line in the log."""
        self.started_at = time.monotonic()
        self.outcome = "abort"  # unless somebody knows better
        self.timeline = Timeline(request_state.request_id, request_state.tenant, self.started_at)
        self._request_state = request_state
        self._is_background = bool(getattr(request_state, "is_background", False))  # nobody waits for it
        self._metrics = metrics
        self._history = history
        self._is_taken_over = False
        self._is_over = False
        setattr(request_state, IS_COUNTED, True)
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
        status = _status_of(error)
        self._metrics.request_rejected(self.outcome, status)
        self._end_timeline(status, error)
        if not self._is_background:
            self._history.add_refused(self.timeline)
        self._tell_log(TokenCounts())

    @contextmanager
    def running(self, request: RunningRequest, ahead: Ahead) -> Iterator[None]:
        """Around the generation of an answer: however it is left, the request is finished.

        ahead: who was there when the queue took it
        """
        self._is_taken_over = True
        self.timeline.request_id = self._request_state.request_id  # the body may have named another
        self._metrics.request_started(request.choices_per_prompt, request.max_tokens)
        self.timeline.admit(request, ahead, time.monotonic())
        if not self._is_background:  # thousands of a batch would push out what somebody asks about
            self._history.add(self.timeline)
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            self.outcome = _outcome_of(error, BROKEN_OFF, "error")
            failure = error
            raise
        finally:
            self._is_over = True
            self._finish(failure)

    def _finish(self, failure: Exception | None) -> None:
        status = _status_of(failure) if failure is not None or self.outcome == "abort" else 200
        seconds = self._end_timeline(status, failure)
        counts, timing = self.timeline.counts, self.timeline.timing
        if self._is_background:
            self._metrics.background_finished(self.outcome, status, counts)
        else:
            self._metrics.request_finished(self.outcome, status, counts, seconds, timing)
        self._tell_log(counts)

    def first_token(self) -> None:
        now = time.monotonic()
        if not self._is_background:
            self._metrics.first_token(now - self.started_at)
        self.timeline.begin_answer(now)

    def tokens(self, num_tokens: int, previous_at: float | None, now: float | None) -> None:
        """Tokens of one choice, and when it had some before; both times in seconds, time.monotonic."""
        if not num_tokens or now is None:
            return
        if previous_at is None or self._is_background:
            self._metrics.tokens_delivered(num_tokens, None)
            return
        self._metrics.tokens_delivered(num_tokens, now - previous_at)
        if now - previous_at > self.timeline.pause[1]:
            self.timeline.pause = previous_at, now - previous_at

    def _end_timeline(self, status: int, error: BaseException | None) -> float:
        """Returns the seconds that it took, from its arrival."""
        timeline, now = self.timeline, time.monotonic()
        timeline.request_id = self._request_state.request_id
        timeline.end(self.outcome, status, now)
        if isinstance(error, ApiError):
            timeline.error = error.message[:MAX_ERROR_CHARACTERS]
        return now - self.started_at

    def _tell_log(self, counts: TokenCounts) -> None:
        self._request_state.log_fields = (
            f"outcome={self.outcome} prompt_tokens={counts.num_prompt_tokens} "
            f"cached_tokens={counts.num_cached_tokens} output_tokens={counts.num_output_tokens} "
            f"accepted_drafts={counts.num_accepted_drafts}"
        )


def _outcome_of(error: BaseException | None, by_status: dict[int, str], otherwise: str) -> str:
    if isinstance(error, ApiError):
        return by_status.get(error.status, otherwise)
    return "error" if _is_mistake(error) else "abort"


def _status_of(error: BaseException | None) -> int:
    if isinstance(error, ApiError):
        return error.status
    return 500 if _is_mistake(error) else CLIENT_CLOSED_REQUEST


def _is_mistake(error: BaseException | None) -> bool:
    """Whether it is ours: a client that left in the middle of an answer raises nothing, or cancels."""
    return isinstance(error, Exception) and not isinstance(error, ClientDisconnect)
