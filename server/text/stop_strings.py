"""Incremental search for stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The strings that end an answer, prepared once for all of its choices: that takes a step a character."""

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self.strings = sorted(strings, key=len, reverse=True)  # where two end at once, the longer one wins
        self.borders = [_borders(string) for string in self.strings]

    def __bool__(self) -> bool:
        return bool(self.strings)


class StopSearch:
    """Watches one text for several strings at once, a character at a time, and never looks at a character twice.

    Knuth, Morris and Pratt, "Fast pattern matching in strings" (1977), one automaton per string: its state is the
    length of the longest beginning of the string that the text ends with. A client may send long strings that almost
    match at every character; the cost stays constant per character.
    """

    def __init__(self, stops: StopStrings) -> None:
        self._strings = stops.strings
        self._borders = stops.borders
        self._states = [0] * len(stops.strings)

    def advance(self, character: str) -> str | None:
        """Takes in a character. Returns the longest stop string that ends with it."""
        found = None
        for i, string in enumerate(self._strings):
            state = self._states[i]
            while state and string[state] != character:
                state = self._borders[i][state - 1]
            if string[state] == character:
                state += 1
            if state == len(string):
                found = found or string
                state = self._borders[i][state - 1]
            self._states[i] = state
        return found

    @property
    def num_held(self) -> int:
        """Length of the longest tail of the text that may be the beginning of a stop string."""
        return max(self._states, default=0)


def _borders(string: str) -> list[int]:
    """For each beginning of the string, the length of its longest proper prefix that is also its suffix."""
    borders, length = [0] * len(string), 0
    for i in range(1, len(string)):
        while length and string[i] != string[length]:
            length = borders[length - 1]
        if string[i] == string[length]:
            length += 1
        borders[i] = length
    return borders
