"""Numbers and names the calls of one answer, and tells of them: at once, or each when it is whole."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable

from server.parsing.answer_parts import (
    AnswerDelta,
    ContentDelta,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallBegin,
    ToolCallEnd,
)

_LETTERS = string.ascii_letters + string.digits
MAX_CALLS = 1024  # of one answer; what looks like more is content


def make_call_id(length: int = 24, prefix: str = "call_") -> str:
    """A new id of a call, as OpenAI's look."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


def make_short_id() -> str:
    """A new id of the one form that Mistral's templates take: nine letters and digits."""
    return make_call_id(9, "")


class CallEmitter:
    """holds: tells of a call when it is whole, so that one that is not can be taken back."""

    def __init__(self, *, holds: bool, make_id: Callable[[], str] = make_call_id) -> None:
        self.num_calls = 0
        self.is_open = False
        self.holds, self._make_id = holds, make_id
        self._held: list[AnswerDelta] = []
        self._ids: set[str] = set()

    def begin(self, name: str, call_id: str = "") -> list[AnswerDelta]:
        if not call_id or call_id in self._ids:
            call_id = self._make_id()
        self._ids.add(call_id)
        self.is_open = True
        return self._tell(ToolCallBegin(self.num_calls, call_id, name))

    def arguments(self, text: str) -> list[AnswerDelta]:
        return self._tell(ToolArgumentsDelta(self.num_calls, text)) if text else []

    def end(self) -> list[AnswerDelta]:
        """The call is whole."""
        told = self._tell(ToolCallEnd(self.num_calls))
        return self._close() + told if not self.holds else self._close()

    def leave(self) -> list[AnswerDelta]:
        """The call stays as it is: the answer was cut in the middle of it."""
        return self._close()

    def take_back(self) -> bool:
        """The call was none. False if it has been told already, so that it stays, unfinished."""
        self.is_open = False
        if self.holds:
            self._held.clear()
            return True
        self.num_calls += 1
        return False

    def _tell(self, delta: AnswerDelta) -> list[AnswerDelta]:
        if not self.holds:
            return [delta]
        self._held.append(delta)
        return []

    def _close(self) -> list[AnswerDelta]:
        held, self._held = self._held, []
        self.is_open = False
        self.num_calls += 1
        return held


def merged(deltas: list[AnswerDelta]) -> list[AnswerDelta]:
    """The deltas with neighbours of one kind joined."""
    joined: list[AnswerDelta] = []
    texts: list[str] = []  # of the last of `joined`, so far

    def close() -> None:
        if len(texts) > 1:
            joined[-1] = _with_text(joined[-1], "".join(texts))

    for delta in deltas:
        text = getattr(delta, "text", None)
        if text is not None and joined and _is_more_of(delta, joined[-1]):
            texts.append(text)
            continue
        close()
        joined.append(delta)
        texts = [text] if text is not None else []
    close()
    return joined


def _is_more_of(delta: AnswerDelta, last: AnswerDelta) -> bool:
    return type(delta) is type(last) and getattr(delta, "index", None) == getattr(last, "index", None)


def _with_text(delta: AnswerDelta, text: str) -> AnswerDelta:
    """The delta with another text; one that has none is not changed."""
    match delta:
        case ContentDelta():
            return ContentDelta(text)
        case ReasoningDelta():
            return ReasoningDelta(text)
        case ToolArgumentsDelta(index=index):
            return ToolArgumentsDelta(index, text)
        case _:
            return delta
