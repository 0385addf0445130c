"""Wires: how the events of a stream are written as bytes. Each API has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

LINE_ENDS = {text.encode(): b"\\u%04x" % ord(text) for text in "\u2028\u2029\x85"}
"""Characters that may stand in JSON as they are, but at which many readers of events cut lines."""


class Wire(Protocol):
    """The interface of a way to write events.

    keep_alive: what is sent where nothing else is to be said; empty: nothing may be
    end: what follows the last event, whatever that was
    """

    @property
    def media_type(self) -> str: ...

    @property
    def keep_alive(self) -> bytes: ...

    @property
    def end(self) -> bytes: ...

    def frame(self, event: msgspec.Struct, text: bytes) -> bytes:
        """An event on the wire. text: the event in JSON"""
        ...


@dataclass(frozen=True, slots=True)
class ServerSentEvents:
    """The format of `text/event-stream`. is_named: whether an event's type, its tag, stands on a line of its own"""

    is_named: bool = False
    keep_alive: bytes = b": keep-alive\n\n"
    end: bytes = b""
    media_type: str = "text/event-stream"

    def frame(self, event: msgspec.Struct, text: bytes) -> bytes:
        if not self.is_named:
            return b"data: " + without_line_ends(text) + b"\n\n"
        return b"event: " + str(event.__struct_config__.tag).encode() + b"\ndata: " + without_line_ends(text) + b"\n\n"


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A JSON text on each line, and nothing between them."""

    keep_alive: bytes = b""
    end: bytes = b""
    media_type: str = "application/x-ndjson"

    def frame(self, event: msgspec.Struct, text: bytes) -> bytes:
        return without_line_ends(text) + b"\n"


DONE = b"data: [DONE]\n\n"
DATA_EVENTS = ServerSentEvents(end=DONE)
"""OpenAI's completions: no names, and a mark at the end."""
NAMED_EVENTS = ServerSentEvents(is_named=True)


def without_line_ends(text: bytes) -> bytes:
    if not text.isascii():
        for character, escaped in LINE_ENDS.items():
            if character in text:
                text = text.replace(character, escaped)
    return text
