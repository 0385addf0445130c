"""The format in which a model writes reasoning and tool calls, as data: markers and encodings, read off its template.

Markers are kept as the template writes them, blanks included, because that is what a grammar must force. A parser is
lenient about the blanks around and inside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

FormatSource = Literal["template", "override", "fallback", "none"]
CallKind = Literal["json", "named", "tagged", "loose"]
"""How a call is encoded.

json: an object that has the name and the arguments in it, `{"name": "f", "arguments": {"a": 1}}`
named: the name in text, and then the arguments as a JSON object: `f[ARGS]{"a": 1}`
tagged: the name, and then each argument in tags: `<function=f><parameter=a>1</parameter></function>`
loose: the name, and then an object whose keys stand bare and whose strings have delimiters of their own
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """What stands around reasoning (`open`, `close`), and around the answer behind it, if anything does."""

    open: str
    close: str
    answer_open: str = ""
    answer_close: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """How calls are written: a section of calls, of which each is `call_open`, its text, `call_close`.

        section_open  call_open NAME name_end ARGUMENTS call_close  separator  call_open ... call_close  section_close

    Of kind json, an object stands for NAME to ARGUMENTS; with `is_list`, the objects of a section are a JSON list. Of
    kind tagged, ARGUMENTS are any number of `key_open KEY key_close VALUE value_close`.
    """

    kind: CallKind = "json"
    section_open: str = ""
    section_close: str = ""
    call_open: str = ""
    call_close: str = ""
    separator: str = ""
    is_list: bool = False
    is_bare: bool = False  # a JSON object at the beginning of an answer is a call, whatever stands before it or not
    other_triggers: tuple[str, ...] = ()  # which a model may write instead of the opening
    name_key: str = "name"
    arguments_key: str = "arguments"
    name_end: str = ""
    id_open: str = ""  # of an id between the name and name_end, where there is one
    key_open: str = ""
    key_close: str = ""
    value_close: str = ""
    quote: str = '"'  # around the strings of a loose object

    @property
    def opening(self) -> str:
        """What begins the first call of a section."""
        return self.section_open + ("[" if self.is_list else "") + self.call_open

    @property
    def closing(self) -> str:
        """What ends the last one."""
        return self.call_close + ("]" if self.is_list else "") + self.section_close

    @property
    def between(self) -> str:
        """What stands between two calls."""
        return self.call_close + (self.separator or (", " if self.is_list else "")) + self.call_open


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """All that is told apart in an answer. name: of the format, for people.

    source: "template" where it was derived, "override" where a known family decided, "fallback" where the template
    knows no tools and the server's own instructions stand in for it, "none".
    """

    name: str = "plain"
    source: FormatSource = "none"
    reasoning: ReasoningFormat | None = None
    calls: CallFormat | None = None
    is_harmony: bool = False  # messages with channels, which are not markers in a text but its structure


PLAIN = AnswerFormat()
FormatT = TypeVar("FormatT", ReasoningFormat, CallFormat)


class Spelling:
    """Special tokens as single characters that no text has: lone surrogates, which no bytes decode to.

    A token that the text hides can so stand in the text that is parsed, and nothing that a model writes in letters
    looks like it. Tokens that no marker names are left out.
    """

    def __init__(self, markers: Iterable[str], tokens: Iterable[str]) -> None:
        """tokens: the special tokens that will come as such, by their spelling"""
        texts = list(markers)
        named = sorted({token for token in tokens if token and any(token in text for text in texts)}, key=len)
        self._characters = {token: chr(0xD800 + i) for i, token in enumerate(reversed(named[:1024]))}
        self._named = {character: token for token, character in self._characters.items()}

    def marker(self, text: str) -> str:
        """A marker with its special tokens as characters."""
        for token, character in self._characters.items():  # the longest first
            text = text.replace(token, character)
        return text

    def merge(self, text: str, specials: Iterable[tuple[int, str]]) -> str:
        """The text with the special tokens that are known where they stand in it."""
        pieces, begin = [], 0
        for place, token in specials:
            character = self._characters.get(token)
            if character is not None:
                pieces += [text[begin:place], character]
                begin = place
        return "".join([*pieces, text[begin:]]) if pieces else text

    def visible(self, text: str) -> str:
        """The text without special tokens."""
        if not self._named or text.isascii():
            return text
        return "".join(character for character in text if character not in self._named)

    def spell(self, marked: FormatT) -> FormatT:
        """A format with its markers as they stand in the text that is parsed."""
        changes: dict[str, Any] = {}
        for field in fields(marked):
            value = getattr(marked, field.name)
            if isinstance(value, str) and field.name not in ("kind", "name_key", "arguments_key"):
                changes[field.name] = self.marker(value)
            elif isinstance(value, tuple):
                changes[field.name] = tuple(map(self.marker, value))
        return replace(marked, **changes)  # a text for a text, texts for texts


def markers_of(answer_format: AnswerFormat) -> list[str]:
    """Every marker of a format."""
    found: list[str] = []
    for part in (answer_format.reasoning, answer_format.calls):
        for field in fields(part) if part is not None else ():
            value = getattr(part, field.name)
            found += [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else []
    return found
