"""Server-sent events out of a response's bytes (WHATWG HTML, section 9.2), as far as OpenAI streams use them."""

from __future__ import annotations


class EventSplitter:
    """Feeds on pieces of a stream, however they were cut, and gives the data of each event once it is complete.

    Comments, `event:`, `id:` and `retry:` lines are passed over; several `data:` lines are joined with a line feed.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        is_usual = piece.startswith(b"data: ") and piece.endswith(b"\n\n") and piece.count(b"\n") == 2
        if is_usual and self.is_between_events:
            return [piece[6:-2]]
        return self._feed_lines(piece)

    @property
    def is_between_events(self) -> bool:
        """False while part of an event has arrived."""
        return not self._rest and not self._data

    def _feed_lines(self, piece: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
