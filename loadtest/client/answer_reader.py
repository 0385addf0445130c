"""Reads one streamed answer: when its tokens came, how many they were, and whether it is whole."""

from __future__ import annotations

import msgspec

from loadtest.client.outcome import Answer, Failure, FailureKind, Outcome


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct, gc=False):
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Event(msgspec.Struct):
    """The fields of a completion chunk that a measurement needs; msgspec skips the rest."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decoder = msgspec.json.Decoder(_Event)

NORMAL_FINISH_REASONS = {"stop", "length", "tool_calls", "function_call", "content_filter"}


class EventSplitter:
    """Server-sent events out of a stream's pieces, however they were cut (WHATWG HTML, section 9.2).

    Comments, `event:`, `id:` and `retry:` lines are passed over; several `data:` lines are joined with a line feed.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        is_usual = piece.startswith(b"data: ") and piece.endswith(b"\n\n") and piece.count(b"\n") == 2
        if is_usual and self.is_between_events:
            return [piece[6:-2]]
        return self._feed_lines(piece)

    @property
    def is_between_events(self) -> bool:
        """False while part of an event has arrived."""
        return not self._rest and not self._data

    def _feed_lines(self, piece: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class AnswerReader:
    """Reads the body of one streamed answer: `feed` takes its pieces at their arrival, `outcome` judges the whole.

    num_output_tokens: exactly so many must come (ignore_eos); None: as many as the model likes
    has_done_marker: the stream must end with `data: [DONE]`; False for servers that never send it
    """

    def __init__(self, num_output_tokens: int | None, *, has_done_marker: bool = True) -> None:
        self._num_asked, self._has_done_marker = num_output_tokens, has_done_marker
        self._splitter = EventSplitter()
        self.num_events = 0
        self._first_token_at: float | None = None
        self._last_token_at = 0.0
        self._last_event_at = 0.0
        self._gaps: list[float] = []
        self._texts: list[str] = []
        self._usage: _Usage | None = None
        self._finish_reason: str | None = None
        self._finish_at = 0.0
        self._is_done = False
        self._ended: set[int] = set()  # choices
        self._failure: tuple[FailureKind, str] | None = None

    def feed(self, received_at: float, piece: bytes) -> None:
        for data in self._splitter.feed(piece):
            self.num_events += 1
            self._last_event_at = received_at
            if self._is_done:
                self._fail(FailureKind.TWICE, f"after [DONE] came {data[:200]!r}")
            if data == b"[DONE]":
                self._is_done = True
                continue
            try:
                event = _decoder.decode(data)
            except msgspec.DecodeError as error:
                self._fail(FailureKind.BAD_EVENT, f"{error}: {data[:200]!r}")
                continue
            if event.error is not msgspec.UNSET and bytes(event.error) != b"null":
                self._fail(FailureKind.ERROR_EVENT, bytes(event.error)[:300].decode(errors="replace"))
            self._take(event, received_at)

    def _take(self, event: _Event, received_at: float) -> None:
        if event.usage is not None:
            self._usage = event.usage
        for choice in event.choices:
            if choice.index in self._ended:
                self._fail(FailureKind.TWICE, f"choice {choice.index} had ended, and went on")
            if choice.finish_reason is not None:
                self._ended.add(choice.index)
                self._finish_reason = choice.finish_reason
                self._finish_at = received_at
            delta = choice.delta
            text = choice.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning))
            if text:
                self._texts.append(text)
                self._token_came(received_at)

    def _token_came(self, received_at: float) -> None:
        if self._first_token_at is None:
            self._first_token_at = received_at
        else:
            self._gaps.append(received_at - self._last_token_at)
        self._last_token_at = received_at

    def _fail(self, kind: FailureKind, detail: str) -> None:
        self._failure = self._failure or (kind, detail)

    def outcome(self, *, started_at: float, sent_at: float) -> Outcome:
        """The outcome of the request. To be called once, when the body is complete by the rules of HTTP."""
        self._count_tokens_without_text()
        self._judge()
        if self._failure is not None:
            kind, detail = self._failure
            return Failure(kind, detail, started_at, self._last_event_at or sent_at)
        assert self._first_token_at is not None
        usage = self._usage
        details = usage.prompt_tokens_details if usage is not None else None
        drafts = usage.completion_tokens_details if usage is not None else None
        return Answer(
            started_at=started_at,
            sent_at=sent_at,
            first_token_at=self._first_token_at,
            last_token_at=self._last_token_at,
            finished_at=self._last_event_at,
            gaps=tuple(self._gaps),
            num_prompt_tokens=usage.prompt_tokens if usage is not None else 0,
            num_cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
            num_output_tokens=self._num_output_tokens(),
            num_events=self.num_events,
            is_counted=usage is None,
            text="".join(self._texts),
            num_accepted_drafts=(drafts.accepted_prediction_tokens or 0) if drafts is not None else 0,
            num_rejected_drafts=(drafts.rejected_prediction_tokens or 0) if drafts is not None else 0,
        )

    def _count_tokens_without_text(self) -> None:
        """Counts last tokens without text, such as special tokens, at the arrival of the finish reason."""
        num_chunks = len(self._gaps) + (self._first_token_at is not None)
        if self._finish_at > self._last_token_at and self._num_output_tokens() > num_chunks:
            self._token_came(self._finish_at)

    def _num_output_tokens(self) -> int:
        if self._usage is not None:
            return self._usage.completion_tokens
        return len(self._gaps) + (self._first_token_at is not None)

    def _judge(self) -> None:
        """Finds the first thing that is wrong with the stream as a whole."""
        if (self._has_done_marker and not self._is_done) or not self._splitter.is_between_events:
            self._fail(FailureKind.CUT, f"the stream ended after {self.num_events} events without [DONE]")
        elif self._finish_reason is None:
            self._fail(FailureKind.NO_FINISH_REASON, f"{self.num_events} events, none with a finish_reason")
        elif self._finish_reason not in NORMAL_FINISH_REASONS:
            self._fail(FailureKind.UNFINISHED, f"finish_reason {self._finish_reason}")
        elif not self._has_length():
            asked, got = self._num_asked, self._num_output_tokens()
            self._fail(FailureKind.WRONG_LENGTH, f"asked for {asked} tokens, got {got} ({self._finish_reason})")
        elif self._first_token_at is None:
            self._fail(FailureKind.EMPTY, f"{self._num_output_tokens()} tokens")

    def _has_length(self) -> bool:
        if self._num_asked is None:
            return True
        if self._usage is None:  # chunks are no tokens: one may hold several, so only the server's word remains
            return self._finish_reason == "length"
        return self._usage.completion_tokens == self._num_asked
