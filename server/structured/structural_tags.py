"""Structural tags: free text, in which a trigger begins a part that must follow a grammar of its own.

How models call tools: they write what they like until, say, `<tool_call>`, and from there on a name and arguments by a
schema, up to `</tool_call>`. Written as one Lark grammar with lazy lexemes: free text ends with the first trigger.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.grammar import GrammarSpec, grammar_list, looks_like_tag, part

ANY_TEXT = "(?s:.*)"


@dataclass(frozen=True, slots=True)
class Tag:
    """A constrained part: `begin`, a text of the grammar `content`, `end`. None as content: nothing between them."""

    begin: str
    content: GrammarSpec | None
    end: str


def triggered_tags(
    tags: Sequence[Tag],
    triggers: Sequence[str],
    *,
    at_least_one: bool = False,
    stop_after_first: bool = False,
    has_text: bool = True,
    special_tokens: Collection[str] = (),
) -> GrammarSpec:
    """The grammar of free text with tags in it. Raises ValueError for tags that no trigger begins.

    triggers: each begins some of the tags (`<function=` those of all functions); behind it, one of these must follow
    at_least_one: the text is not over before a tag; stop_after_first: it is over after one
    has_text: whether there may be text before and between tags, and, where none is demanded, instead of them
    special_tokens: the texts of the tokenizer's special tokens, which are no text to the grammar: triggers, beginnings
    and ends that are, or begin with, one of them are matched by that token
    """
    if not tags:
        raise ValueError("structural tags: there must be at least one tag")
    if any(not trigger for trigger in triggers):
        raise ValueError("structural tags: a trigger must not be empty")
    writer = LarkWriter(special_tokens)
    rules = [f"text: /{ANY_TEXT}/"]
    names = []
    grouped = _by_trigger(tags, triggers)
    for number, (trigger, group) in enumerate(grouped.items()):
        rests = [_Rest(tag.begin[len(trigger) :], tag.content, tag.end) for tag in group]
        rest = " | ".join(writer.sequence(one.begin, one.content, one.end) for one in rests)
        names.append(f"tag_{number}")
        if not has_text:
            rules.append(f"tag_{number}: {writer.text(trigger)} ({rest})")
        elif special := writer.special_at(trigger):
            rules.append(f"tag_{number}: text {special} {writer.text(trigger.removeprefix(special))} ({rest})")
        else:
            rules.append(f"head_{number}[lazy]: /{ANY_TEXT}/ {json.dumps(trigger)}")
            rules.append(f"tag_{number}: head_{number} ({rest})")
    any_tag = f"({' | '.join(names)})"
    if stop_after_first:
        start = any_tag if at_least_one else f"{any_tag} | text" if has_text else f"{any_tag}?"
    else:
        start = f"{any_tag}{'+' if at_least_one else '*'}{' text' if has_text else ''}"
    lark = "\n".join([f"start: {start}", *rules]) + "\n"
    return grammar_list([{"name": "answer", "lark_grammar": lark}, *writer.parts])


@dataclass(frozen=True, slots=True)
class _Rest:
    begin: str
    content: GrammarSpec | None
    end: str


def _by_trigger(tags: Sequence[Tag], triggers: Sequence[str]) -> dict[str, list[Tag]]:
    """The tags that each trigger begins: of several that do, the longest."""
    found: dict[str, list[Tag]] = {}
    for tag in tags:
        fitting = [trigger for trigger in triggers if tag.begin.startswith(trigger)]
        if not fitting:
            raise ValueError(
                f"structural tags: no trigger begins the tag {tag.begin[:100]!r}; add to triggers what it starts with"
            )
        found.setdefault(max(fitting, key=len), []).append(tag)
    return found


class LarkWriter:
    """Writes sequences of texts and contents as Lark, and gathers the contents as grammars of their own."""

    def __init__(self, special_tokens: Collection[str]) -> None:
        self.parts: list[dict[str, object]] = []
        self._special_tokens = sorted(filter(looks_like_tag, special_tokens), key=len, reverse=True)
        self._known: dict[GrammarSpec, str] = {}

    def sequence(self, begin: str, content: GrammarSpec | None, end: str) -> str:
        written = [self.text(begin), "" if content is None else self.content(content), self.text(end)]
        return " ".join(filter(None, written)) or '""'

    def text(self, text: str) -> str:
        """The text as Lark: its special tokens by their names, the rest as strings."""
        written = []
        while text:
            places = [(text.find(token), token) for token in self._special_tokens if token in text]
            place, token = min(places, key=lambda one: (one[0], -len(one[1])), default=(len(text), ""))
            if place:
                written.append(json.dumps(text[:place]))
            if token:
                written.append(token)
            text = text[place + len(token) :]
        return " ".join(written)

    def special_at(self, text: str) -> str:
        """The special token that a text begins with, or nothing."""
        return next((token for token in self._special_tokens if text.startswith(token)), "")

    def content(self, content: GrammarSpec) -> str:
        """The reference to a grammar of its own."""
        name = self._known.get(content)
        if name is None:
            name = self._known[content] = f"part_{len(self._known)}"
            self.parts.append(part(content, name))
        return f"@{name}"
