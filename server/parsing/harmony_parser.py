"""The parser of harmony, the format of gpt-oss: an answer is messages with headers, whose channels say what they are.

    <|channel|>analysis<|message|>REASONING<|end|><|start|>assistant<|channel|>final<|message|>CONTENT<|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS<|call|>

The prompt ends with `<|start|>assistant`. Commentary to nobody is content: it is said to the user between calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from server.parsing.answer_format import Spelling
from server.parsing.answer_parts import AnswerDelta, ContentDelta, ReasoningDelta
from server.parsing.argument_readers import JsonArguments
from server.parsing.buffered_parser import BufferedParser
from server.parsing.call_emitter import MAX_CALLS, CallEmitter, make_call_id
from server.parsing.call_readers import NAME
from server.parsing.markers import MarkerSearch

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
TOKENS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
MAX_HEADER_LENGTH = 512  # characters
_RECIPIENT = re.compile(r"\bto=([^\s\ud800-\udfff<]+)")


class HarmonyParser(BufferedParser):
    """Of one choice. See `AnswerParser` for what it takes and gives."""

    def __init__(
        self,
        *,
        parses_calls: bool,
        holds_calls: bool = False,
        hidden_tokens: Sequence[str] = (),
        make_id: Callable[[], str] = make_call_id,
    ) -> None:
        super().__init__(Spelling(TOKENS, hidden_tokens), CallEmitter(holds=holds_calls, make_id=make_id))
        self._parses_calls = parses_calls
        spelt = {token: self._spelling.marker(token) for token in TOKENS}
        self._message, self._channel, self._start = spelt[MESSAGE], spelt[CHANNEL], spelt[START]
        self._header_search = MarkerSearch([spelt[MESSAGE]])
        self._body_search = MarkerSearch([spelt[token] for token in (START, CHANNEL, END, CALL, RETURN)])
        self._arguments: JsonArguments | None = None
        self._is_first = True
        self._kind: type[ContentDelta] | type[ReasoningDelta] = ContentDelta

    def finish(self, *, is_cut: bool = False) -> list[AnswerDelta]:
        rest, self._buffer = self._buffer, ""
        if self._state == self._begin:
            if self._is_first or not self._looks_like_header(rest):
                self._emit(ContentDelta, rest)
        elif self._state == self._body:
            self._emit(self._kind, rest)
        elif self._arguments is not None and not self._arguments.is_done and (is_cut or not self._emitter.holds):
            self._out += self._emitter.leave()
        elif self._arguments is not None and not self._arguments.is_done:
            self._fail(rest)
        return self._taken_out()

    def _begin(self) -> bool:
        """From behind a message's end up to the next one's body; an answer that begins without one is content."""
        if self._is_first and not self._looks_like_header(self._buffer):
            self._is_first = False
            return self._begin_body(ContentDelta, 0)
        place, marker = self._header_search.find(self._buffer)
        if not marker:
            if len(self._buffer) > MAX_HEADER_LENGTH:  # it is none; its own markers must not begin it again
                self._emit(ContentDelta, self._buffer)
                return self._begin_body(ContentDelta, len(self._buffer))
            return False
        header, self._is_first = self._buffer[:place], False
        place += len(marker)
        recipient = _RECIPIENT.search(header)
        if recipient is not None and self._begin_call(recipient[1].removeprefix("functions."), place):
            return True
        is_reasoning = "analysis" in header.partition(self._channel)[2]
        return self._begin_body(ReasoningDelta if is_reasoning else ContentDelta, place)

    def _looks_like_header(self, text: str) -> bool:
        text = text.lstrip()
        begins = (self._channel, self._start, self._message, "to=", "assistant")
        return any(text.startswith(begin) or begin.startswith(text) for begin in begins)

    def _begin_body(self, kind: type[ContentDelta] | type[ReasoningDelta], place: int) -> bool:
        self._kind, self._buffer = kind, self._buffer[place:]
        self._state = self._body
        return True

    def _begin_call(self, name: str, place: int) -> bool:
        if not self._parses_calls or not NAME.fullmatch(name) or self._emitter.num_calls >= MAX_CALLS:
            return False
        self._raw = [self._buffer[:place]]
        self._buffer = self._buffer[place:]
        self._name, self._has_begun = name, False
        self._arguments = JsonArguments()
        self._state = self._call
        return True

    def _body(self) -> bool:
        place, marker = self._body_search.find(self._buffer)
        self._emit(self._kind, self._buffer[:place])
        self._buffer = self._buffer[place:]
        if not marker:
            return False
        return self._end_message(marker)

    def _end_message(self, marker: str) -> bool:
        """A header's first token stays for the header."""
        if marker not in (self._start, self._channel):
            self._buffer = self._buffer[len(marker) :]
        self._state = self._begin
        return True

    def _call(self) -> bool:
        assert self._arguments is not None
        out: list[str] = []
        place = self._arguments.read(self._buffer, 0, out)
        if self._emitter.holds or not self._has_begun:
            self._raw.append(self._buffer[:place])
        self._buffer = self._buffer[place:]
        if self._arguments.has_failed and not (out or self._has_begun):
            self._fail("")
            return True
        if out and not self._has_begun:
            self._has_begun = True
            self._out += self._emitter.begin(self._name)
        self._out += self._emitter.arguments("".join(out))
        if self._arguments.has_failed:
            self._fail("")
            return True
        if self._arguments.is_done:
            self._out += self._emitter.end()
            self._begin_body(ContentDelta, 0)  # nothing but blanks should come before the message's end
            self._state = self._behind_call
            return True
        return False

    def _behind_call(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        place, marker = self._body_search.find(self._buffer)
        if place == 0 and not marker:
            return False
        self._state = self._body
        return True

    def _fail(self, rest: str) -> None:
        """The message's body is no JSON object: it is content, with its header where nothing was told of it yet."""
        was_told = self._has_begun and not self._emitter.take_back()
        if not was_told:
            self._emit(ContentDelta, "".join(self._raw))
        self._emit(ContentDelta, rest)
        self._raw.clear()
        self._arguments = None
        self._kind, self._state = ContentDelta, self._body

    def _emit(self, kind: type[ContentDelta] | type[ReasoningDelta], text: str) -> None:
        text = self._spelling.visible(text)
        if text:
            self._out.append(kind(text))
