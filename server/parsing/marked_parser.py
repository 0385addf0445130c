"""The parser of answers in which markers tell reasoning, content and tool calls apart: all formats but harmony.

A state machine over text that comes in pieces. It keeps of the text what may still be the beginning of a marker, and of
a call what shows whether it is one; nothing is looked at again that is longer than a marker or a name, so almost-calls
cost what other text costs (`num_scanned` counts it).

What looks like a call and is none is content, markers included. A call that has been told of (`holds_calls` is False)
and turns out to be none stays a call, as far as its arguments are JSON, and the rest of it is content: nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.parsing.answer_format import AnswerFormat, CallFormat, Spelling, markers_of
from server.parsing.answer_parts import AnswerDelta, ContentDelta, ReasoningDelta
from server.parsing.buffered_parser import BufferedParser
from server.parsing.call_emitter import MAX_CALLS, CallEmitter, make_call_id, merged
from server.parsing.call_readers import CallReader, JsonCall, NamedCall, ToolKinds
from server.parsing.markers import DIFFERS, WAITS, MarkerSearch, first_part, match_marker


class MarkedParser(BufferedParser):
    """Of one choice. See `AnswerParser` for what it takes and gives."""

    def __init__(
        self,
        answer_format: AnswerFormat,
        *,
        tools: ToolKinds | None = None,
        is_thinking: bool = False,
        holds_calls: bool = False,
        hidden_tokens: Sequence[str] = (),
        make_id: Callable[[], str] = make_call_id,
    ) -> None:
        """tools: None: calls are not told apart. is_thinking: the prompt has opened the reasoning already.

        hidden_tokens: the special tokens that come as such, and not as text
        """
        spelling = Spelling(markers_of(answer_format), hidden_tokens)
        super().__init__(spelling, CallEmitter(holds=holds_calls, make_id=make_id))
        reasoning, calls = answer_format.reasoning, answer_format.calls
        self._reasoning = spelling.spell(reasoning) if reasoning is not None else None
        self._calls = spelling.spell(calls) if calls is not None and tools is not None else None
        self._tools = tools or {}
        self._search = MarkerSearch(self._content_markers())
        self._close_search = MarkerSearch([self._reasoning.close.strip()] if self._reasoning else [])
        self._blanks: list[str] = []  # behind what was said, or before anything
        self._drops_blanks = False  # those before the next content: a marker was there
        self._is_trusted = False  # the call that is read has been told of
        self._in_section = self._in_list = False
        self._to_match = ""  # of an opening
        self._reader: CallReader | None = None
        if is_thinking and self._reasoning is not None:
            self._drops_blanks = True
            self._state = self._reason_again

    def finish(self, *, is_cut: bool = False) -> list[AnswerDelta]:
        out = self.feed("")
        rest, self._buffer = self._buffer, ""
        if self._state in (self._open, self._read_call):
            self._finish_call(rest, is_cut=is_cut)
        elif self._state in (self._reason, self._reason_again):
            self._think(rest)
        elif self._state in (self._begin, self._content):
            self._say(rest)
        if not self._drops_blanks:
            self._emit(ContentDelta, "".join(self._blanks))
        more, self._out = self._out, []
        return merged(out + more)

    # What is said, and thought

    def _begin(self) -> bool:
        """Before anything was said, or behind a marker: reasoning may begin, or a call that no marker begins."""
        self._take_blanks()
        if not self._buffer:
            return False
        if self._reasoning is not None:
            end = match_marker(self._buffer, 0, self._reasoning.open)
            if end == WAITS:
                return False
            if end > 0:
                return self._start_reasoning(end)
        if self._calls is not None and self._calls.is_bare and self._buffer[0] == "{" and self._may_call():
            self._raw = [*self._blanks]
            self._blanks.clear()
            self._new_reader()
            return True
        self._state = self._content
        return True

    def _content(self) -> bool:
        place, marker = self._search.find(self._buffer)
        self._say(self._buffer[:place])
        if not marker:
            self._buffer = self._buffer[place:]
            return False
        rest = self._buffer[place + len(marker) :]
        if self._reasoning is not None and marker == self._reasoning.open.strip():
            self._buffer = rest
            return self._start_reasoning(0)
        if self._reasoning is not None and marker in (self._reasoning.answer_open, self._reasoning.answer_close):
            self._buffer, self._drops_blanks = rest, True
            self._blanks.clear()
            return True
        if not self._may_call():
            self._say(marker)
            self._buffer = rest
            return True
        self._start_call(marker, rest)
        return True

    def _start_reasoning(self, place: int) -> bool:
        self._buffer, self._drops_blanks = self._buffer[place:], True
        self._blanks.clear()
        self._state = self._reason
        return True

    def _reason_again(self) -> bool:
        """The prompt has opened it; a model may do so once more."""
        assert self._reasoning is not None
        self._take_blanks()
        end = match_marker(self._buffer, 0, self._reasoning.open) if self._buffer else WAITS
        if end == WAITS:
            return False
        self._buffer = self._buffer[max(end, 0) :]
        self._state = self._reason
        return True

    def _reason(self) -> bool:
        place, marker = self._close_search.find(self._buffer)
        self._think(self._buffer[:place])
        self._buffer = self._buffer[place + len(marker) :]
        if marker:
            self._blanks.clear()
            self._drops_blanks = True
            self._state = self._begin
        return bool(marker)

    def _think(self, text: str) -> None:
        self._tell(ReasoningDelta, text)

    def _say(self, text: str) -> None:
        self._tell(ContentDelta, text)

    def _tell(self, kind: type[ContentDelta] | type[ReasoningDelta], text: str) -> None:
        """Blanks wait for what comes behind them: before a marker they are not part of the answer."""
        body = text.rstrip()
        if body:
            begin = "" if self._drops_blanks else "".join(self._blanks)
            self._emit(kind, begin + (body.lstrip() if self._drops_blanks else body))
            self._drops_blanks = False
            self._blanks.clear()
        if len(body) < len(text):
            self._blanks.append(text[len(body) :])

    def _emit(self, kind: type[ContentDelta] | type[ReasoningDelta], text: str) -> None:
        text = self._spelling.visible(text)
        if text:
            self._out.append(kind(text))

    def _take_blanks(self) -> None:
        rest = self._buffer.lstrip()
        if len(rest) < len(self._buffer):
            self._blanks.append(self._buffer[: len(self._buffer) - len(rest)])
            self._buffer = rest

    # Calls

    def _content_markers(self) -> list[str]:
        found: list[str] = []
        if (calls := self._calls) is not None:
            openings = (calls.section_open, calls.call_open, *calls.other_triggers)
            found += [first_part(opening) for opening in openings]
        if (reasoning := self._reasoning) is not None:
            found += [reasoning.answer_open, reasoning.answer_close]
            if any("\ud800" <= character <= "\udfff" for character in reasoning.open):
                found.append(reasoning.open.strip())  # no text looks like it, so it means what it says anywhere
        return found

    def _may_call(self) -> bool:
        return self._emitter.num_calls < MAX_CALLS

    def _start_call(self, marker: str, rest: str) -> None:
        assert self._calls is not None
        calls = self._calls
        self._raw = [*self._blanks, marker]
        self._blanks.clear()
        self._buffer = rest
        self._in_list = self._in_section = False
        if calls.section_open and marker == first_part(calls.section_open):
            self._in_section = True
            self._to_match = calls.section_open.strip().removeprefix(marker) + calls.call_open
        elif marker in calls.other_triggers:
            self._to_match = ""
        else:
            self._to_match = calls.call_open.strip().removeprefix(marker)
        self._state = self._open

    def _open(self) -> bool:
        """Behind a trigger: the rest of the opening, and the bracket of a list."""
        assert self._calls is not None
        self._keep_blanks()
        if self._to_match.strip():
            end = match_marker(self._buffer, 0, self._to_match)
            if end == WAITS:
                return False
            if end == DIFFERS:
                return self._give_up()
            self._keep(end)
            self._to_match = ""
            self._keep_blanks()
        if not self._buffer:
            return False
        if self._buffer[0] == "[" and not self._in_list and self._calls.kind in ("json", "named"):
            self._keep(1)
            self._in_list = True
            return True
        self._new_reader()
        return True

    def _new_reader(self) -> None:
        assert self._calls is not None
        is_json = self._calls.kind == "json" or (self._calls.kind == "named" and self._buffer[0] == "{")
        self._reader = JsonCall(self._calls) if is_json else NamedCall(self._calls, self._tools)
        self._is_trusted = False
        self._state = self._read_call

    def _read_call(self) -> bool:
        reader = self._reader
        assert reader is not None
        self._keep(reader.read(self._buffer, 0))
        if reader.has_begun and not self._is_trusted:
            if self._is_unlikely(reader):
                return self._give_up()
            self._is_trusted = True
            self._out += self._emitter.begin(reader.name, reader.call_id)
        if self._is_trusted:
            self._out += self._emitter.arguments(reader.take_arguments())
        if reader.has_failed:
            return self._give_up()
        if reader.is_done:
            self._out += self._emitter.end()
            self._raw.clear()
            self._reader, self._is_trusted = None, False
            self._state = self._close
            return True
        return False

    def _is_unlikely(self, reader: CallReader) -> bool:
        """Any JSON may begin an answer: one that names no tool of the request is no call."""
        assert self._calls is not None
        return self._calls.is_bare and reader.name not in self._tools

    def _close(self) -> bool:
        """Behind a call: what closes it, if it is there. A list closes its objects with commas."""
        assert self._calls is not None
        self._buffer = self._buffer.lstrip()
        end = match_marker(self._buffer, 0, self._calls.call_close)
        if end == WAITS:
            return False
        self._buffer = self._buffer[max(end, 0) :]
        self._state = self._go_on
        return True

    def _go_on(self) -> bool:
        """Between calls: another one, the end of the section, or something else."""
        assert self._calls is not None
        calls = self._calls
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        if self._in_list or calls.is_bare:
            if self._buffer[0] == (";" if calls.is_bare else ",") and self._may_call():
                self._buffer = self._buffer[1:]
                return True
            if self._buffer[0] == "{" and self._may_call():
                self._new_reader()
                return True
            if self._buffer[0] == "]" and self._in_list:
                self._buffer = self._buffer[1:]
                self._in_list = False
                return True
        for marker in (calls.call_open, calls.section_close) if self._in_section else ():
            end = match_marker(self._buffer, 0, marker) if marker.strip() else DIFFERS
            if end == WAITS:
                return False
            if end > 0:
                return self._go_behind(end, is_call=marker == calls.call_open)
        self._end_calls()
        return True

    def _go_behind(self, place: int, *, is_call: bool) -> bool:
        if is_call and self._may_call():
            self._raw = [self._buffer[:place]]
            self._buffer = self._buffer[place:]
            self._state = self._open
        elif is_call:
            self._end_calls()
        else:
            self._buffer = self._buffer[place:]
            self._end_calls()
        return True

    def _end_calls(self) -> None:
        self._in_section = self._in_list = False
        self._drops_blanks = True
        self._blanks.clear()
        bare = self._calls is not None and self._calls.is_bare
        self._state = self._content if bare else self._begin

    def _keep(self, place: int) -> None:
        """Moves what was read of the text to what may be taken back."""
        if self._holds or not self._is_trusted:
            self._raw.append(self._buffer[:place])
        self._buffer = self._buffer[place:]

    def _keep_blanks(self) -> None:
        self._keep(len(self._buffer) - len(self._buffer.lstrip()))

    @property
    def _holds(self) -> bool:
        return self._emitter.holds

    def _give_up(self) -> bool:
        """It was no call: what was kept of it is content, and the rest is looked at as such."""
        was_told = self._is_trusted and not self._emitter.take_back()
        raw = "".join(self._raw)
        if was_told and self._reader is not None:
            raw = self._reader.held()
        self._raw.clear()
        self._reader, self._is_trusted, self._in_section, self._in_list = None, False, False, False
        self._drops_blanks = self._drops_blanks and not raw
        self._state = self._content
        self._say(raw)
        return True

    def _finish_call(self, rest: str, *, is_cut: bool) -> None:
        """The text ended in the middle of a call: one that was cut stays a call."""
        if self._is_trusted and (is_cut or not self._holds):
            self._out += self._emitter.leave()
            return
        self._give_up()
        self._say(rest)


def call_markers(calls: CallFormat) -> tuple[str, ...]:
    """What begins a call or a section of calls, for people."""
    return tuple(filter(None, (calls.section_open.strip(), calls.call_open.strip(), *calls.other_triggers)))
