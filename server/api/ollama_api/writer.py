"""What is generated, as Ollama's lines of JSON: one for each piece, and one that is `done`, with the counts."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO

import msgspec
from msgspec import UNSET

from server.api.ollama_api.fields import ErrorLine, Line, SaidCall, SaidFunction, SaidMessage
from server.errors import ApiError
from server.generation.answer_reader import AnswerReader
from server.generation.choice import Delta
from server.generation.generation import Generation
from server.parsing.answer_parts import (
    AnswerDelta,
    ContentDelta,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallBegin,
    ToolCallEnd,
)

NO_ARGUMENTS = msgspec.Raw(b"{}")


class OllamaWriter:
    """Formats one generation. is_chat: as /api/chat does, not /api/generate"""

    def __init__(self, generation: Generation, *, is_chat: bool, streams: bool) -> None:
        self._generation, self._is_chat = generation, is_chat
        self._reader = AnswerReader(generation.job.shape, holds_calls=not streams)
        self._call: ToolCallBegin | None = None
        self._arguments = StringIO()

    def chunks(self, delta: Delta) -> Iterator[Line]:
        for part in self._reader.read(delta):
            said = self._said(part)
            if said is not None:
                yield self._line(said)
        if delta.finish_reason is not None:
            yield self._end(self._line(SaidMessage()), delta)

    def text_chunk(self, index: int, text: str) -> None:
        """Every line has its own time."""

    def last_chunk(self) -> None:
        """The line that is done says all."""

    def failure(self, error: ApiError) -> Iterator[ErrorLine]:
        yield ErrorLine(error.message)

    def reply(self, choices: list[Delta]) -> Line:
        content, thinking, calls = StringIO(), StringIO(), []
        for part in self._reader.read(choices[0]):
            said = self._said(part)
            if said is None:
                continue
            content.write(said.content)
            thinking.write(said.thinking or "")
            calls += said.tool_calls or []
        whole = SaidMessage(content=content.getvalue())
        whole.thinking, whole.tool_calls = thinking.getvalue() or UNSET, calls or UNSET
        return self._end(self._line(whole), choices[0])

    def _said(self, part: AnswerDelta) -> SaidMessage | None:
        """A call is told when it is whole."""
        match part:
            case ContentDelta(text=text):
                return SaidMessage(content=text)
            case ReasoningDelta(text=text):
                return SaidMessage(thinking=text)
            case ToolCallBegin():
                self._call, self._arguments = part, StringIO()
            case ToolArgumentsDelta(text=text):
                self._arguments.write(text)
            case ToolCallEnd() if self._call is not None:
                arguments = msgspec.Raw((self._arguments.getvalue() or "{}").encode())
                function = SaidFunction(self._call.name, arguments)
                return SaidMessage(tool_calls=[SaidCall(self._call.call_id, function)])
        return None

    def _line(self, said: SaidMessage) -> Line:
        line = Line(model=self._generation.job.model, created_at=now())
        if self._is_chat:
            line.message = said
        else:
            line.response, line.thinking = said.content, said.thinking
        return line

    def _end(self, line: Line, last: Delta) -> Line:
        counts, timing = self._generation.counts(), self._generation.timing()
        line.done, line.done_reason = True, "length" if last.finish_reason == "length" else "stop"
        line.prompt_eval_count, line.eval_count = counts.num_prompt_tokens, counts.num_output_tokens
        line.total_duration, line.load_duration = _nanoseconds(timing.total), 0
        line.prompt_eval_duration, line.eval_duration = _nanoseconds(timing.prefill), _nanoseconds(timing.decode)
        return line


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
