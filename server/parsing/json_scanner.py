"""An incremental scanner of one JSON value (RFC 8259): accepts text in pieces, and never looks at a character twice.

What it lets through is always the beginning of valid JSON. The one thing that it mends are control characters inside
strings, which models write where they mean a line break: they come out escaped.
"""

from __future__ import annotations

import re

MAX_DEPTH = 64
_RUN = re.compile('[^"\\\\\x00-\x1f\ud800-\udfff]+')  # of a string; lone surrogates are special tokens, and end it
_BLANKS = " \t\n\r"
_DIGITS = "0123456789"
_HEX = "0123456789abcdefABCDEF"
_CONTROLS = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}
_NUMBER: dict[str, dict[str, str]] = {  # the state after each character; those of _NUMBER_ENDS may be the last
    "minus": {"0": "zero", **dict.fromkeys("123456789", "whole")},
    "zero": {".": "dot", "e": "power", "E": "power"},
    "whole": {**dict.fromkeys(_DIGITS, "whole"), ".": "dot", "e": "power", "E": "power"},
    "dot": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": {**dict.fromkeys(_DIGITS, "fraction"), "e": "power", "E": "power"},
    "power": {**dict.fromkeys(_DIGITS, "exponent"), "+": "sign", "-": "sign"},
    "sign": dict.fromkeys(_DIGITS, "exponent"),
    "exponent": dict.fromkeys(_DIGITS, "exponent"),
}
_NUMBER_BEGINS = {"-": "minus", "0": "zero", **dict.fromkeys("123456789", "whole")}
_NUMBER_ENDS = frozenset({"zero", "whole", "fraction", "exponent"})
_LITERALS = {"t": "true", "f": "false", "n": "null"}


class JsonScanner:
    """One value. `is_done` and `has_failed` say how it ended; while both are False, it goes on."""

    def __init__(self) -> None:
        self.is_done = False
        self.has_failed = False
        self._stack: list[str] = []  # "{" and "[" that are open
        self._state = "value"
        self._is_key = False
        self._number = ""
        self._literal = ""  # what must still come of true, false or null
        self._num_hex = 0  # digits of an escape that must still come

    def read(self, text: str, start: int, out: list[str]) -> int:
        """Reads on from a place in the text; returns where it stopped: the text's end, the value's, or what is wrong.

        out: gets what was read, without the blanks before the value
        """
        place = start
        while place < len(text) and not (self.is_done or self.has_failed):
            if self._state == "string":
                place = self._read_string(text, place, out)
            elif self._state in ("escape", "hex"):
                place = self._read_escape(text, place, out)
            elif self._state == "number":
                place = self._read_number(text, place, out)
            elif self._state == "literal":
                place = self._read_literal(text, place, out)
            else:
                place = self._read_structure(text, place, out)
        return place

    def finish(self) -> None:
        """No more text comes: a number that stands alone is whole now."""
        if self._state == "number" and not self._stack and self._number in _NUMBER_ENDS:
            self.is_done = True

    def _read_string(self, text: str, place: int, out: list[str]) -> int:
        if run := _RUN.match(text, place):
            out.append(run[0])
            return run.end()
        character = text[place]
        if character == '"':
            out.append('"')
            if self._is_key:
                self._state = "colon"
            else:
                self._end_value()
        elif character == "\\":
            self._state = "escape"
            out.append(character)
        elif "\ud800" <= character <= "\udfff":
            return self._fail(place)
        else:
            out.append(_CONTROLS.get(character, f"\\u{ord(character):04x}"))
        return place + 1

    def _read_escape(self, text: str, place: int, out: list[str]) -> int:
        character = text[place]
        if self._state == "hex":
            if character not in _HEX:
                return self._fail(place)
            self._num_hex -= 1
            self._state = "hex" if self._num_hex else "string"
            out.append(character)
        elif character == "u":
            self._state, self._num_hex = "hex", 4
            out.append(character)
        elif character in '"\\/bfnrt':
            self._state = "string"
            out.append(character)
        else:
            return self._fail(place)
        return place + 1

    def _read_number(self, text: str, place: int, out: list[str]) -> int:
        character = text[place]
        after = _NUMBER[self._number].get(character)
        if after is not None:
            self._number = after
            out.append(character)
            return place + 1
        if self._number not in _NUMBER_ENDS:
            return self._fail(place)
        self._end_value()
        return place

    def _read_literal(self, text: str, place: int, out: list[str]) -> int:
        if text[place] != self._literal[0]:
            return self._fail(place)
        out.append(text[place])
        self._literal = self._literal[1:]
        if not self._literal:
            self._end_value()
        return place + 1

    def _read_structure(self, text: str, place: int, out: list[str]) -> int:
        character, state = text[place], self._state
        if character in _BLANKS:
            if self._stack:
                out.append(character)
            return place + 1
        if character in "}]" and self._may_close(character):
            self._stack.pop()
            self._end_value()
        elif state == "colon" and character == ":":
            self._state = "value"
        elif state == "comma" and character == ",":
            self._state = "key" if self._stack[-1] == "{" else "value"
        elif state in ("key", "first key") and character == '"':
            self._state, self._is_key = "string", True
        elif not (state in ("value", "first value") and self._begin_value(character)):
            return self._fail(place)
        out.append(character)
        return place + 1

    def _may_close(self, character: str) -> bool:
        if not self._stack or self._stack[-1] + character not in ("{}", "[]"):
            return False
        return self._state == "comma" or self._state == ("first key" if character == "}" else "first value")

    def _begin_value(self, character: str) -> bool:
        if character in "{[":
            self._stack.append(character)
            self._state = "first key" if character == "{" else "first value"
            return len(self._stack) <= MAX_DEPTH
        if character == '"':
            self._state, self._is_key = "string", False
        elif character in _NUMBER_BEGINS:
            self._state, self._number = "number", _NUMBER_BEGINS[character]
        elif character in _LITERALS:
            self._state, self._literal = "literal", _LITERALS[character][1:]
        else:
            return False
        return True

    def _end_value(self) -> None:
        self._state = "comma"
        self.is_done = not self._stack

    def _fail(self, place: int) -> int:
        self.has_failed = True
        return place
