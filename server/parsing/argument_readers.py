"""Readers of a call's arguments, one per encoding: the text that a model writes in, the JSON text of an object out.

All work on a text that grows at its end: `read` says how much of it they are done with, and gets the rest again with
more behind it, which is never more than a marker or a name. What they let out is the beginning of valid JSON, always.
"""

from __future__ import annotations

import json
import re
from typing import Protocol

from server.parsing.answer_format import CallFormat
from server.parsing.argument_kinds import ANY, ParameterKinds, as_json, is_text
from server.parsing.json_scanner import MAX_DEPTH, JsonScanner
from server.parsing.markers import DIFFERS, WAITS, behind_blanks, first_part, match_marker, num_held

MAX_KEY_LENGTH = 256  # characters
_SPECIAL = re.compile("[\ud800-\udfff]")


class ArgumentReader(Protocol):
    """The interface. While neither `is_done` nor `has_failed`, more text may come."""

    is_done: bool
    has_failed: bool

    def read(self, text: str, place: int, out: list[str]) -> int:
        """Reads on from a place; returns up to where it is done with the text. out: gets JSON."""
        ...

    def held(self) -> str:
        """What was read of the text and did not come out yet."""
        ...


def make_reader(calls: CallFormat, kinds: ParameterKinds) -> ArgumentReader:
    """calls: spelt as the text is; kinds: of the parameters of the tool that is called"""
    if calls.kind == "tagged":
        return TaggedArguments(calls, kinds)
    return LooseArguments(calls.quote) if calls.kind == "loose" else JsonArguments()


class JsonArguments:
    """Arguments that are a JSON object already."""

    def __init__(self) -> None:
        self.is_done = self.has_failed = False
        self._scanner = JsonScanner()
        self._has_begun = False

    def read(self, text: str, place: int, out: list[str]) -> int:
        if not self._has_begun:
            place = behind_blanks(text, place)
            if place == len(text):
                return place
            self._has_begun = True
            self.has_failed = text[place] != "{"
            if self.has_failed:
                return place
        place = self._scanner.read(text, place, out)
        self.is_done, self.has_failed = self._scanner.is_done, self._scanner.has_failed
        return place

    def held(self) -> str:
        return ""


class _InStates:
    """A reader that is always in one state, whose method `_read_STATE` reads on, and may go to another."""

    def __init__(self, state: str) -> None:
        self.is_done = self.has_failed = False
        self._state = state

    def read(self, text: str, place: int, out: list[str]) -> int:
        while not (self.is_done or self.has_failed):
            before = place, self._state
            place = getattr(self, f"_read_{self._state}")(text, place, out)
            if (place, self._state) == before:
                break
        return place


class TaggedArguments(_InStates):
    """Arguments that stand in tags, each between its name and a closing tag; values have no quotes."""

    def __init__(self, calls: CallFormat, kinds: ParameterKinds) -> None:
        super().__init__("gap")
        self._calls, self._kinds = calls, kinds
        self._num_keys = 0
        self._value_close = first_part(calls.value_close)
        self._value_kinds = ANY
        self._value: list[str] = []  # of one whose type shows at its end
        self._line_break = ""  # at the end of what came of the value, which may belong to the tag

    def held(self) -> str:
        return "".join(self._value) + self._line_break

    def _read_gap(self, text: str, place: int, out: list[str]) -> int:
        place = behind_blanks(text, place)
        end = match_marker(text, place, self._calls.key_open)
        if end >= 0 and place < len(text):
            self._state = "key"
            return end
        closes = match_marker(text, place, self._calls.call_close)
        if WAITS in (end, closes) or place == len(text):
            return place
        self.has_failed = closes == DIFFERS
        if not self.has_failed:
            self.is_done = True
            out.append("}" if self._num_keys else "{}")
        return place

    def _read_key(self, text: str, place: int, out: list[str]) -> int:
        mark = first_part(self._calls.key_close)
        found = text.find(mark, place)
        if found < 0:
            self.has_failed = len(text) - place > MAX_KEY_LENGTH + len(mark)
            return place
        end = match_marker(text, found, self._calls.key_close)
        if end == WAITS:
            return place
        key = text[place:found].strip().strip("\"'")
        self.has_failed = end == DIFFERS or not 0 < len(key) <= MAX_KEY_LENGTH or not _is_plain(key)
        if self.has_failed:
            return place
        out.append(f"{', ' if self._num_keys else '{'}{_quoted(key)}: ")
        self._num_keys += 1
        self._value_kinds = self._kinds.get(key, ANY)
        self._value.clear()
        if is_text(self._value_kinds):
            out.append('"')
        self._state = "begin"
        return end

    def _read_begin(self, text: str, place: int, out: list[str]) -> int:
        """The line break behind an opening tag is not of the value."""
        if place == len(text):
            return place
        self._state = "value"
        return place + 1 if text[place] == "\n" and self._calls.key_close.endswith("\n") else place

    def _read_value(self, text: str, place: int, out: list[str]) -> int:
        found = text.find(self._value_close, place)
        end = found if found >= 0 else len(text) - num_held(text, [self._value_close], place)
        plain_end = _plain_end(text, place, end)
        self.has_failed = plain_end < end
        if self.has_failed:
            found, end = -1, plain_end
        piece = self._line_break + text[place:end]
        self._line_break = (
            "\n" if not self.has_failed and piece.endswith("\n") and self._calls.value_close.startswith("\n") else ""
        )
        piece = piece.removesuffix(self._line_break)
        if not is_text(self._value_kinds):
            self._value.append(piece)
        elif piece:
            out.append(_quoted(piece)[1:-1])
        if found < 0:
            return end
        self._line_break = ""
        out.append('"' if is_text(self._value_kinds) else as_json("".join(self._value), self._value_kinds))
        self._value.clear()
        self._state = "close"
        return found

    def _read_close(self, text: str, place: int, out: list[str]) -> int:
        end = match_marker(text, place, self._calls.value_close)
        self.has_failed = end == DIFFERS
        if end >= 0:
            self._state = "gap"
            return end
        return place


class LooseArguments(_InStates):
    """An object whose keys stand bare, and whose strings stand between delimiters in which nothing is escaped."""

    def __init__(self, quote: str) -> None:
        super().__init__("value")
        self._quote = quote
        self._stack: list[str] = []
        self._bare: list[str] = []  # a number, true, false or null, so far

    def held(self) -> str:
        return "".join(self._bare)

    def _read_value(self, text: str, place: int, out: list[str]) -> int:
        place = behind_blanks(text, place)
        if place == len(text):
            return place
        end = match_marker(text, place, self._quote)
        if end == WAITS:
            return place
        character = text[place]
        if not self._stack and character != "{":
            self.has_failed = True
        elif end >= 0:
            out.append('"')
            self._state = "string"
            return end
        elif character in "{[":
            self._stack.append(character)
            out.append(character)
            self._state = "first" if character == "{" else "item"
            self.has_failed = len(self._stack) > MAX_DEPTH
            return place + 1
        else:
            self._state = "bare"
            self._bare.clear()
        return place

    def _read_item(self, text: str, place: int, out: list[str]) -> int:
        """The first of a list, or its end."""
        place = behind_blanks(text, place)
        if place < len(text):
            self._state = "comma" if text[place] == "]" else "value"
        return place

    def _read_first(self, text: str, place: int, out: list[str]) -> int:
        """The first key of an object, or its end."""
        place = behind_blanks(text, place)
        if place < len(text):
            self._state = "comma" if text[place] == "}" else "key"
        return place

    def _read_key(self, text: str, place: int, out: list[str]) -> int:
        found = text.find(":", place)
        key = text[place : found if found >= 0 else len(text)].strip()
        key = key.removeprefix(self._quote).removesuffix(self._quote).strip('"')
        self.has_failed = len(key) > MAX_KEY_LENGTH or not _is_plain(key) or any(mark in key for mark in ",{}[]")
        if found < 0 or self.has_failed:
            return place
        self.has_failed = not key
        out.append(_quoted(key) + ": ")
        self._state = "value"
        return found + 1

    def _read_string(self, text: str, place: int, out: list[str]) -> int:
        found = text.find(self._quote, place)
        end = found if found >= 0 else len(text) - num_held(text, [self._quote], place)
        plain_end = _plain_end(text, place, end)
        self.has_failed = plain_end < end
        if self.has_failed:
            found, end = -1, plain_end
        out.append(_quoted(text[place:end])[1:-1])
        if found < 0:
            return end
        out.append('"')
        self._state = "comma"
        return found + len(self._quote)

    def _read_bare(self, text: str, place: int, out: list[str]) -> int:
        end = place
        while end < len(text) and text[end] not in ",}]":
            end += 1
        self._bare.append(text[place:end])
        if end < len(text):
            value = "".join(self._bare)
            self.has_failed = not value.strip() or not _is_plain(value)
            if not self.has_failed:
                out.append(as_json(value.strip(), ANY))
                self._bare.clear()
                self._state = "comma"
        return end

    def _read_comma(self, text: str, place: int, out: list[str]) -> int:
        place = behind_blanks(text, place)
        if place == len(text):
            return place
        character = text[place]
        if character == ",":
            out.append(", ")
            self._state = "key" if self._stack[-1] == "{" else "value"
        elif self._stack[-1] + character in ("{}", "[]"):
            self._stack.pop()
            out.append(character)
            self.is_done = not self._stack
        else:
            self.has_failed = True
            return place
        return place + 1


def _plain_end(text: str, place: int, end: int) -> int:
    """Where the first special token stands between two places, or the second one."""
    special = _SPECIAL.search(text, place, end)
    return end if special is None else special.start()


def _is_plain(text: str) -> bool:
    """Whether no special token stands in the text."""
    return _SPECIAL.search(text) is None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
