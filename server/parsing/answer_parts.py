"""The parts of an answer as they come: the deltas that every parser of model output makes, and that every API words.

`AnswerParser` is the one interface: text and special tokens of one choice go in, in pieces of any size, and deltas come
out. Their order is the order of the text. Joined, they do not depend on how the text was cut. Chat completions put them
into `choices[].delta`; other APIs adapt the same deltas (`server.generation.answer_reader` makes them of a generation's
pieces, with the tokens that each stands for).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Protocol

import msgspec


class ContentDelta(msgspec.Struct, frozen=True):
    """More of what is said to the user. Never empty."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True):
    """More of what the model thinks before it answers or between. Never empty."""

    text: str


class ToolCallBegin(msgspec.Struct, frozen=True):
    """A call has begun: its name is known, and nothing of its arguments was told before.

    index: of the calls of this choice, from 0; call_id: unique in the answer
    """

    index: int
    call_id: str
    name: str


class ToolArgumentsDelta(msgspec.Struct, frozen=True):
    """More of the JSON text of a call's arguments. Never empty; all of a call joined are its arguments, exactly."""

    index: int
    text: str


class ToolCallEnd(msgspec.Struct, frozen=True):
    """A call is whole: its arguments are one JSON object. Does not come where the answer ends in the middle of it."""

    index: int


AnswerDelta = ContentDelta | ReasoningDelta | ToolCallBegin | ToolArgumentsDelta | ToolCallEnd

Special = tuple[int, str]
"""A special token that the text hides: behind how many characters of the piece it stands, and how it is spelt."""


class AnswerParser(Protocol):
    """The interface of what takes one choice's output apart. One object per choice; never raises, whatever is fed."""

    def feed(self, text: str, specials: Sequence[Special] = ()) -> list[AnswerDelta]:
        """What has become certain with this piece. specials: in the order of their places."""
        ...

    def finish(self, *, is_cut: bool = False) -> list[AnswerDelta]:
        """What was held back, once no more text comes. is_cut: the answer ended for its length, not by itself."""
        ...


class PlainParser:
    """Of a model whose format has neither reasoning nor calls, or of a request that wants neither told apart."""

    def feed(self, text: str, specials: Sequence[Special] = ()) -> list[AnswerDelta]:
        return [ContentDelta(text)] if text else []

    def finish(self, *, is_cut: bool = False) -> list[AnswerDelta]:
        return []


@dataclass(slots=True)
class ToolCall:
    """One call of an answer. arguments: JSON text, cut off where the answer was."""

    call_id: str
    name: str
    arguments: str = ""
    is_whole: bool = False


@dataclass(slots=True)
class ParsedAnswer:
    """All parts of one choice. content and reasoning: "" where there is none."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


class AnswerCollector:
    """Joins the deltas of one choice. Linear: no text is copied again for what comes after it."""

    def __init__(self) -> None:
        self._content, self._reasoning = StringIO(), StringIO()
        self._calls: list[ToolCall] = []
        self._arguments: list[StringIO] = []

    def add(self, deltas: Iterable[AnswerDelta]) -> None:
        for delta in deltas:
            match delta:
                case ContentDelta(text=text):
                    self._content.write(text)
                case ReasoningDelta(text=text):
                    self._reasoning.write(text)
                case ToolCallBegin(call_id=call_id, name=name):
                    self._calls.append(ToolCall(call_id, name))
                    self._arguments.append(StringIO())
                case ToolArgumentsDelta(index=index, text=text):
                    self._arguments[index].write(text)
                case ToolCallEnd(index=index):
                    self._calls[index].is_whole = True

    def collected(self) -> ParsedAnswer:
        for call, arguments in zip(self._calls, self._arguments, strict=True):
            call.arguments = arguments.getvalue()
        return ParsedAnswer(self._content.getvalue(), self._reasoning.getvalue(), self._calls)
