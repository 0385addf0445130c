"""Structural tags as vLLM's clients write them: a list of structures and triggers, or a tree of formats.

The tree is XGrammar's: const_string, json_schema, regex, grammar, any_text, sequence, or, tag, triggered_tags,
tags_with_separator.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence

from engine.grammar import GrammarSpec, grammar_list
from server.structured.structural_tags import ANY_TEXT, LarkWriter, Tag, triggered_tags

MAX_DEPTH = 32  # of formats in formats
Format = Mapping[str, object]


def tag_grammar(given: object, special_texts: Collection[str], *, blanks: str | None) -> GrammarSpec:
    """The grammar of a structural tag. Raises ValueError that says which part is wrong.

    special_texts: of the tokenizer's special tokens; blanks: as of `GrammarSpec`
    """
    if not isinstance(given, Mapping):
        raise ValueError("a structural tag is an object with format, or with structures and triggers")
    if "format" in given:
        writer = _FormatWriter(special_texts, blanks)
        start = writer.expression(given["format"], "format", 0)
        lark = "\n".join([f"start: {start}", *writer.rules, f"text: /{ANY_TEXT}/"]) + "\n"
        return grammar_list([{"name": "answer", "lark_grammar": lark}, *writer.lark.parts])
    structures = _list(given, "structures", "")
    tags = [
        Tag(
            _text(one, "begin", place),
            GrammarSpec("json_schema", _schema(one, place), blanks),
            _text(one, "end", place),
        )
        for place, one in ((f"structures[{i}]", _mapping(one, f"structures[{i}]")) for i, one in enumerate(structures))
    ]
    return triggered_tags(tags, _texts(given, "triggers", ""), special_tokens=special_texts)


class _FormatWriter:
    """Writes formats as expressions of Lark, and the rules that these need."""

    def __init__(self, special_texts: Collection[str], blanks: str | None) -> None:
        self.lark = LarkWriter(special_texts)
        self.rules: list[str] = []
        self._blanks = blanks
        self._writers: dict[str, Callable[[Format, str, int], str]] = {
            "const_string": lambda one, place, _: self.lark.text(_text(one, "value", place)) or '""',
            "json_schema": self._json_schema,
            "regex": lambda one, place, _: self.lark.content(GrammarSpec("regex", _text(one, "pattern", place))),
            "grammar": lambda one, place, _: self.lark.content(GrammarSpec("lark", _text(one, "grammar", place))),
            "any_text": lambda one, place, depth: "text",
            "sequence": self._sequence,
            "or": self._alternatives,
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._tags_with_separator,
        }

    def expression(self, given: object, place: str, depth: int) -> str:
        if depth > MAX_DEPTH:
            raise ValueError(f"structural tag: formats are nested more than {MAX_DEPTH} deep")
        one = _mapping(given, place)
        write = self._writers.get(str(one.get("type")))
        if write is None:
            raise ValueError(f"structural tag: {place}.type must be one of {', '.join(self._writers)}")
        return f"({write(one, place, depth + 1)})"

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def _json_schema(self, one: Format, place: str, _: int) -> str:
        return self.lark.content(GrammarSpec("json_schema", _schema(one, place, "json_schema"), self._blanks))

    def _elements(self, one: Format, place: str, depth: int) -> list[str]:
        elements = _list(one, "elements", place)
        if not elements:
            raise ValueError(f"structural tag: {place}.elements must not be empty")
        return [self.expression(part, f"{place}.elements[{i}]", depth) for i, part in enumerate(elements)]

    def _sequence(self, one: Format, place: str, depth: int) -> str:
        return " ".join(self._elements(one, place, depth))

    def _alternatives(self, one: Format, place: str, depth: int) -> str:
        return " | ".join(self._elements(one, place, depth))

    def _tag(self, one: Format, place: str, depth: int) -> str:
        begin = self.lark.text(_text(one, "begin", place))
        return f"{begin} {self._behind_begin(one, place, depth)}"

    def _behind_begin(self, one: Format, place: str, depth: int) -> str:
        """The content and the end of a tag: free text goes on up to the end, others follow their own grammar."""
        content, end = _mapping(one.get("content"), f"{place}.content"), _text(one, "end", place)
        if content.get("type") == "any_text" and end and not self.lark.special_at(end):
            return self._rule(f"/{ANY_TEXT}/ {json.dumps(end)}", "[lazy]")
        return f"{self.expression(content, f'{place}.content', depth)} {self.lark.text(end)}"

    def _triggered_tags(self, one: Format, place: str, depth: int) -> str:
        triggers = _texts(one, "triggers", place)
        names = []
        for i, given in enumerate(_list(one, "tags", place)):
            tag_place = f"{place}.tags[{i}]"
            tag = _mapping(given, tag_place)
            begin = _text(tag, "begin", tag_place)
            trigger = max((text for text in triggers if text and begin.startswith(text)), key=len, default="")
            if not trigger:
                raise ValueError(f"structural tag: no trigger begins {tag_place}; add to triggers what it starts with")
            rest = f"{self.lark.text(begin[len(trigger) :])} {self._behind_begin(tag, tag_place, depth)}"
            if special := self.lark.special_at(trigger):
                names.append(self._rule(f"text {special} {self.lark.text(trigger.removeprefix(special))} {rest}"))
            else:
                head = self._rule(f"/{ANY_TEXT}/ {json.dumps(trigger)}", "[lazy]")
                names.append(self._rule(f"{head} {rest}"))
        if not names:
            raise ValueError(f"structural tag: {place}.tags must not be empty")
        tags = f"({' | '.join(names)})"
        if one.get("stop_after_first"):
            return tags if one.get("at_least_one") else f"{tags} | text"
        return f"{tags}{'+' if one.get('at_least_one') else '*'} text"

    def _tags_with_separator(self, one: Format, place: str, depth: int) -> str:
        tags = [
            self._tag(_mapping(tag, f"{place}.tags[{i}]"), f"{place}.tags[{i}]", depth)
            for i, tag in enumerate(_list(one, "tags", place))
        ]
        if not tags:
            raise ValueError(f"structural tag: {place}.tags must not be empty")
        any_tag = self._rule(" | ".join(tags))
        more = "" if one.get("stop_after_first") else f" ({self.lark.text(_text(one, 'separator', place))} {any_tag})*"
        return f"{any_tag}{more}" if one.get("at_least_one") else f"({any_tag}{more})?"


def _mapping(given: object, place: str) -> Format:
    if not isinstance(given, Mapping):
        raise ValueError(f"structural tag: {place} must be an object")
    return given


def _text(one: Format, name: str, place: str) -> str:
    value = one.get(name)
    if not isinstance(value, str):
        raise ValueError(f"structural tag: {_join(place, name)} must be a text")
    return value


def _list(one: Format, name: str, place: str) -> Sequence[object]:
    value = one.get(name)
    if not isinstance(value, list):
        raise ValueError(f"structural tag: {_join(place, name)} must be a list")
    return value


def _texts(one: Format, name: str, place: str) -> list[str]:
    values = _list(one, name, place)
    if not values or not all(isinstance(value, str) and value for value in values):
        raise ValueError(f"structural tag: {_join(place, name)} must be texts, at least one, and none of them empty")
    return [str(value) for value in values]


def _schema(one: Format, place: str, name: str = "schema") -> str:
    value = one.get(name)
    if not isinstance(value, dict | bool):
        raise ValueError(f"structural tag: {_join(place, name)} must be a JSON Schema")
    return json.dumps(value)


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
