"""How the answers of one request are to be taken apart: the format, what is told apart in it, and the parser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.parsing.answer_format import PLAIN, AnswerFormat
from server.parsing.answer_parts import AnswerParser, PlainParser
from server.parsing.call_emitter import make_call_id, make_short_id
from server.parsing.call_readers import ToolKinds
from server.parsing.harmony_parser import HarmonyParser
from server.parsing.marked_parser import MarkedParser


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerShape:
    """The format of an answer, and what of it counts.

    tools: those that may be called; None: calls are not told apart. is_thinking: the prompt has opened the reasoning
    hidden_tokens: the special tokens that a text does not show, and parsers are told of
    """

    answer_format: AnswerFormat = PLAIN
    tools: ToolKinds | None = None
    is_thinking: bool = False
    hidden_tokens: Sequence[str] = ()
    has_short_ids: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether all is content, as it is."""
        form = self.answer_format
        return not form.is_harmony and form.reasoning is None and (self.tools is None or form.calls is None)

    def make_parser(self, *, holds_calls: bool) -> AnswerParser:
        """A parser for one choice. holds_calls: calls come when they are whole, as suits what is not streamed."""
        make_id = make_short_id if self.has_short_ids else make_call_id
        if self.is_plain:
            return PlainParser()
        if self.answer_format.is_harmony:
            return HarmonyParser(
                parses_calls=self.tools is not None,
                holds_calls=holds_calls,
                hidden_tokens=self.hidden_tokens,
                make_id=make_id,
            )
        return MarkedParser(
            self.answer_format,
            tools=self.tools,
            is_thinking=self.is_thinking,
            holds_calls=holds_calls,
            hidden_tokens=self.hidden_tokens,
            make_id=make_id,
        )


PLAIN_SHAPE = AnswerShape()
