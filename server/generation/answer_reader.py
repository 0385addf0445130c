"""From the deltas of a generation to the parts of an answer: what each API words, and what ends a choice."""

from __future__ import annotations

from server.generation.choice import Delta
from server.parsing.answer_parts import AnswerDelta, ToolCallBegin
from server.parsing.answer_shape import AnswerShape
from server.protocol.responses import ChatFinishReason


class AnswerReader:
    """Reads the deltas of one choice, in their order. One object per choice.

    A stream makes one before it begins; a whole answer reads its one delta with `holds_calls`, so that what only began
    as a call is content.
    """

    def __init__(self, shape: AnswerShape, *, holds_calls: bool) -> None:
        self.num_calls = 0
        self._parser = shape.make_parser(holds_calls=holds_calls)
        self._num_characters = 0

    def read(self, delta: Delta) -> list[AnswerDelta]:
        """The parts that are certain with this delta; with the last one, the rest."""
        specials = [(place - self._num_characters, token) for place, token in delta.specials]
        self._num_characters += len(delta.text)
        parts = self._parser.feed(delta.text, specials)
        if delta.finish_reason is not None:
            parts += self._parser.finish(is_cut=delta.finish_reason == "length")
        self.num_calls += sum(isinstance(part, ToolCallBegin) for part in parts)
        return parts

    def finish_reason(self, delta: Delta) -> ChatFinishReason | None:
        """Of the choice, once its last delta was read."""
        return "tool_calls" if delta.finish_reason == "stop" and self.num_calls else delta.finish_reason
