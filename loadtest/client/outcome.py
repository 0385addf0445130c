"""What became of a request. Times are `time.perf_counter()` seconds of this machine's monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FailureKind(StrEnum):
    """Why a request does not count as answered. An HTTP status other than 200 is `http_<status>` instead."""

    CONNECT = "connect"  # no connection: refused, unreachable, name not found
    TIMEOUT = "timeout"  # the answer was not complete in time
    DISCONNECT = "disconnect"  # the connection broke, or what came was not HTTP
    NOT_A_STREAM = "not_a_stream"  # status 200 with a body that is no event stream
    BAD_EVENT = "bad_event"  # an event that is not the JSON it should be
    ERROR_EVENT = "error_event"  # the server reported an error inside the stream
    CUT = "cut"  # the stream ended without its end marker
    NO_FINISH_REASON = "no_finish_reason"  # the end marker came, a finish reason did not
    UNFINISHED = "unfinished"  # a finish reason that means the answer was given up (timeout, abort, error)
    WRONG_LENGTH = "wrong_length"  # another number of tokens than was asked for with ignore_eos
    EMPTY = "empty"  # finished, without a single token
    TWICE = "twice"  # a choice that had ended went on or ended again, or something followed the end marker


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer.

    started_at: the intended arrival (open loop) or the moment of sending (closed loop); all latencies count from it
    gaps: seconds between one chunk with text and the next
    num_output_tokens: from the server's usage, or the number of chunks with text where it gives none (is_counted)
    num_accepted_drafts, num_rejected_drafts: of speculative decoding, from the usage; 0 where it says nothing of them
    """

    started_at: float
    sent_at: float
    first_token_at: float
    last_token_at: float
    finished_at: float
    gaps: tuple[float, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_events: int
    is_counted: bool
    text: str = ""
    num_accepted_drafts: int = 0
    num_rejected_drafts: int = 0

    @property
    def time_to_first_token(self) -> float:
        return self.first_token_at - self.started_at

    @property
    def end_to_end(self) -> float:
        """Seconds until the end marker of the stream arrived."""
        return self.finished_at - self.started_at

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds per token after the first; None for an answer of one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.num_output_tokens - 1)

    def inter_token_latencies(self) -> list[float]:
        """One value for each token after the first.

        The first token of a chunk waited for the gap before the chunk, its other tokens waited zero. How many tokens
        each chunk had need not be known for that: every token beyond one per chunk is one more zero.
        """
        return [*self.gaps, *[0.0] * max(self.num_output_tokens - 1 - len(self.gaps), 0)]


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without a complete answer. Counted by kind; its times and tokens enter no other figure.

    retry_after: seconds that a refusal asks the client to wait, in milliseconds where it says so, else in whole seconds
    """

    kind: str
    detail: str
    started_at: float
    failed_at: float
    retry_after: float | None = None


Outcome = Answer | Failure
