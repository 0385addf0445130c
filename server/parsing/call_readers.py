"""Readers of one call: its name, its id where the format has one, and its arguments as they come.

As readers of arguments do, they work on a text that grows at its end, and get again what they were not done with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Protocol

from server.parsing.answer_format import CallFormat
from server.parsing.argument_kinds import ParameterKinds
from server.parsing.argument_readers import ArgumentReader, JsonArguments, make_reader
from server.parsing.json_scanner import JsonScanner
from server.parsing.markers import DIFFERS, WAITS, behind_blanks, match_marker

MAX_HEADER_LENGTH = 256  # characters of a name and an id
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/]{0,127}")
_HEADER = re.compile(r"\s*(?:functions\.)?([A-Za-z0-9_][A-Za-z0-9_.\-/]*)(?::\d+)?\s*")
_NO_NAME = re.compile(r"[^A-Za-z0-9_.\-/:\s]")
_ID = re.compile(r"[\w.:\-]{1,128}", re.ASCII)
_NAME_KEYS = frozenset({"name", "function"})
_ARGUMENTS_KEYS = frozenset({"arguments", "parameters"})
ToolKinds = Mapping[str, ParameterKinds]
"""By tool: the types of its parameters. The tools of a request, and no others, are in it."""


class CallReader(Protocol):
    """The interface. The call is certain once `has_begun`: its name is there, and its arguments begin or are none."""

    name: str
    call_id: str
    has_begun: bool
    is_done: bool
    has_failed: bool

    def read(self, text: str, place: int) -> int:
        """Reads on from a place; returns up to where it is done with the text."""
        ...

    def take_arguments(self) -> str:
        """The JSON text that has come since the last time."""
        ...

    def held(self) -> str:
        """What was read of the text and is in no arguments yet."""
        ...


class _Call:
    """What readers of calls have found, whatever the form."""

    def __init__(self) -> None:
        self.name = self.call_id = ""
        self.has_begun = self.is_done = self.has_failed = False
        self._out: list[str] = []

    def take_arguments(self) -> str:
        text = "".join(self._out)
        self._out.clear()
        return text


class NamedCall(_Call):
    """A name, what ends it, and arguments in an encoding of their own."""

    def __init__(self, calls: CallFormat, tools: ToolKinds) -> None:
        super().__init__()
        self._calls, self._tools = calls, tools
        self._arguments: ArgumentReader | None = None
        self._has_named = False

    def read(self, text: str, place: int) -> int:
        if self._arguments is None:
            place = self._read_header(text, place)
        if self._arguments is not None and not self.has_failed:
            place = self._arguments.read(text, place, self._out)
            self.is_done, self.has_failed = self._arguments.is_done, self._arguments.has_failed
            self.has_begun = self.has_begun or bool(self._out)
        return place

    def held(self) -> str:
        return "" if self._arguments is None else self._arguments.held()

    def _read_header(self, text: str, place: int) -> int:
        """The name, and perhaps an id, up to what ends them; where that is nothing, or blank, up to the arguments."""
        stop = _behind_name(text, place)
        if stop == len(text):
            self.has_failed = stop - place > MAX_HEADER_LENGTH
            return place
        head, call_id = _HEADER.fullmatch(text, place, stop), ""
        end = match_marker(text, stop, self._calls.name_end)
        if end == DIFFERS and self._calls.id_open:
            begin = match_marker(text, stop, self._calls.id_open)
            stop = _behind_name(text, begin) if begin >= 0 else stop
            call_id = text[max(begin, 0) : stop].strip()
            end = match_marker(text, stop, self._calls.name_end) if begin >= 0 else begin
        if end == WAITS:
            self.has_failed = len(text) - place > 2 * MAX_HEADER_LENGTH
            return place
        self.has_failed = end == DIFFERS or head is None or not NAME.fullmatch(head[1])
        if head is None or self.has_failed:
            return place
        self.name, self.call_id = head[1], call_id if _ID.fullmatch(call_id) else ""
        self._arguments = make_reader(self._calls, self._tools.get(self.name, {}))
        return end


def _behind_name(text: str, place: int) -> int:
    """Where the first character stands that no name and no id has in it, nor around it."""
    found = _NO_NAME.search(text, place)
    return len(text) if found is None else found.start()


class JsonCall(_Call):
    """An object that has the name and the arguments in it, in any order, and perhaps an id.

    The arguments are told as they come if the name stands before them. They may also be a string that holds JSON. A
    call whose arguments are whole is whole, even where the object around them is not closed. An id counts if it comes
    before the call is certain: it is told with the name.
    """

    def __init__(self, calls: CallFormat) -> None:
        super().__init__()
        self._calls = calls
        self._name_keys = _NAME_KEYS | {calls.name_key}
        self._arguments_keys = _ARGUMENTS_KEYS | {calls.arguments_key}
        self._expected_keys = self._name_keys | self._arguments_keys | {"type", "id"}
        self._state = "open"
        self._key = ""
        self._depth = 0  # of objects that are open: one, or two with the form {"function": {...}}
        self._value: JsonScanner | None = None
        self._text: list[str] = []  # of a key, or of a value that is not the arguments' object
        self._arguments: JsonArguments | None = None
        self._has_arguments = False  # whole

    def read(self, text: str, place: int) -> int:
        while not (self.is_done or self.has_failed):
            before = place, self._state
            place = getattr(self, f"_read_{self._state}")(text, place)
            if (place, self._state) == before:
                break
        if self.has_failed and self._has_arguments and self.name:
            self.is_done, self.has_failed = True, False
        begun = self._arguments is not None and bool(self._out)
        self.has_begun = self.has_begun or bool(self.name and (begun or self.is_done))
        return place

    def held(self) -> str:
        """Of a call that has begun it has told all: what stands behind its arguments does not matter."""
        return ""

    def _read_open(self, text: str, place: int) -> int:
        place = behind_blanks(text, place)
        if place < len(text):
            self.has_failed = text[place] != "{"
            if not self.has_failed:
                self._depth += 1
                self._state = "key"
                return place + 1
        return place

    def _read_key(self, text: str, place: int) -> int:
        """A key; or the end of an object that has none."""
        if self._value is None:
            place = behind_blanks(text, place)
            if place == len(text):
                return place
            if text[place] == "}":
                self._state = "comma"
                return place
            self.has_failed = text[place] != '"'
            if self.has_failed:
                return place
            self._value = JsonScanner()
            self._text.clear()
        place = self._value.read(text, place, self._text)
        self.has_failed = self._value.has_failed
        if self._value.is_done:
            self._key, self._value, self._state = json.loads("".join(self._text)), None, "colon"
            self.has_failed = self._calls.is_bare and self._key not in self._expected_keys
        return place

    def _read_colon(self, text: str, place: int) -> int:
        place = behind_blanks(text, place)
        if place < len(text):
            self.has_failed = text[place] != ":"
            if not self.has_failed:
                self._state = "begin"
                return place + 1
        return place

    def _read_begin(self, text: str, place: int) -> int:
        place = behind_blanks(text, place)
        if place == len(text):
            return place
        character = text[place]
        if character == "{" and self._key == "function" and self._depth == 1:
            self._state = "open"
        elif character == "{" and self._key in self._arguments_keys:
            self._state, self._arguments = "arguments", JsonArguments()
            self.has_failed = self._has_arguments
        else:
            self._state, self._value = "value", JsonScanner()
            self._text.clear()
        return place

    def _read_arguments(self, text: str, place: int) -> int:
        assert self._arguments is not None
        place = self._arguments.read(text, place, self._out)
        self.has_failed = self._arguments.has_failed
        if self._arguments.is_done:
            self._has_arguments, self._state = True, "comma"
        return place

    def _read_value(self, text: str, place: int) -> int:
        assert self._value is not None
        place = self._value.read(text, place, self._text)
        self.has_failed = self._value.has_failed
        if self._value.is_done:
            self._value, self._state = None, "comma"
            self._take(json.loads("".join(self._text)))
        return place

    def _take(self, value: object) -> None:
        """A value that is no object of arguments."""
        if self._key in self._name_keys and not self.name:
            self.has_failed = not isinstance(value, str) or not NAME.fullmatch(value)
            self.name = value if isinstance(value, str) else ""
        elif self._key in self._arguments_keys and not self._has_arguments:
            text = "{}" if value in (None, "") else value
            is_object = isinstance(text, str) and _is_object(text)
            self.has_failed = not is_object
            if is_object:
                self._out.append(str(text).strip())
                self._has_arguments, self._arguments = True, JsonArguments()
        elif (
            self._key == "id"
            and not (self.name and self._arguments is not None)
            and isinstance(value, str)
            and _ID.fullmatch(value)
        ):
            self.call_id = value

    def _read_comma(self, text: str, place: int) -> int:
        place = behind_blanks(text, place)
        if place == len(text):
            return place
        if text[place] == ",":
            self._state = "key"
        elif text[place] == "}":
            self._depth -= 1
            if not self._depth:
                self._close()
        else:
            self.has_failed = True
            return place
        return place + 1

    def _close(self) -> None:
        """The object is whole: a call without arguments has none, except where any object might be one."""
        self.has_failed = not self.name or (self._calls.is_bare and not self._has_arguments)
        self.is_done = not self.has_failed
        if self.is_done and not self._has_arguments:
            self._out.append("{}")


def _is_object(text: str) -> bool:
    scanner, out = JsonArguments(), list[str]()
    place = scanner.read(text, 0, out)
    return scanner.is_done and not text[place:].strip()
