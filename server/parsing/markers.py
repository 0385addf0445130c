"""Search for markers in text that comes in pieces: what is looked at twice is never longer than a marker."""

from __future__ import annotations

import re
from collections.abc import Iterable

WAITS, DIFFERS = -1, -2
MAX_BLANKS = 16  # between the parts of a marker


def match_marker(text: str, place: int, marker: str) -> int:
    """Where a marker that begins at this place of the text ends; WAITS if the text ends before that, DIFFERS if not.

    Blanks around the marker do not belong to it, and where it has blanks inside, the text may have any, or none.
    """
    parts = marker.split()
    for i, part in enumerate(parts):
        if i:
            begin = place
            while place < len(text) and text[place].isspace() and place - begin < MAX_BLANKS:
                place += 1
        found = text[place : place + len(part)]
        if found != part:
            return WAITS if place + len(found) == len(text) and part.startswith(found) else DIFFERS
        place += len(part)
    return place


def behind_blanks(text: str, place: int) -> int:
    """Where the next character stands that is no blank; the text's end if there is none."""
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def first_part(marker: str) -> str:
    """The marker up to its first inner blank."""
    return (marker.split() or [""])[0]


def num_held(text: str, markers: Iterable[str], start: int = 0) -> int:
    """Length of the longest end of the text, from `start` on, that may be the beginning of a marker."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text) - start), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest


class MarkerSearch:
    """Finds the first of several markers. Where two begin at one place, the longer one is meant."""

    def __init__(self, markers: Iterable[str]) -> None:
        self.markers = sorted({marker for marker in markers if marker}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self.markers))) if self.markers else None

    def __bool__(self) -> bool:
        return bool(self.markers)

    def find(self, text: str) -> tuple[int, str]:
        """Where a marker begins, and which; or, where there is none, up to where the text can be let go, and "".

        A marker that is the beginning of a longer one counts once the text tells which it is.
        """
        if self._pattern is None:
            return len(text), ""
        match = self._pattern.search(text)
        if match is None:
            return len(text) - num_held(text, self.markers), ""
        if match.end() == len(text) and any(m != match[0] and m.startswith(match[0]) for m in self.markers):
            return match.start(), ""
        return match.start(), match[0]
