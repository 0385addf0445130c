"""The state machine of parsers: text that comes in pieces, and states that each take some of it off the buffer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from server.parsing.answer_format import Spelling
from server.parsing.answer_parts import AnswerDelta, Special
from server.parsing.call_emitter import CallEmitter, merged

PIECE = 128  # characters that are looked at at once: as the buffer is cut at each marker, it must not be long


class BufferedParser:
    """An `AnswerParser` in the making. A state says whether there is more to do with the buffer as it left it.

    num_scanned: characters that were looked at, for whoever watches the cost
    """

    def __init__(self, spelling: Spelling, emitter: CallEmitter) -> None:
        self._spelling, self._emitter = spelling, emitter
        self._buffer = ""
        self._raw: list[str] = []  # of what looks like a call, while it may be taken back
        self._out: list[AnswerDelta] = []
        self._state: Callable[[], bool] = self._begin
        self.num_scanned = 0

    @abstractmethod
    def _begin(self) -> bool:
        """The first state."""

    def feed(self, text: str, specials: Sequence[Special] = ()) -> list[AnswerDelta]:
        text = self._spelling.merge(text, specials)
        for begin in range(0, len(text), PIECE):
            self._buffer += text[begin : begin + PIECE]
            self._advance()
        return self._taken_out()

    def _advance(self) -> None:
        while self._buffer:
            self.num_scanned += len(self._buffer)
            before = len(self._buffer), self._state
            if not self._state() or (len(self._buffer), self._state) == before:
                break

    def _taken_out(self) -> list[AnswerDelta]:
        out, self._out = self._out, []
        return merged(out)
