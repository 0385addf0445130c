"""The grammar of a whole answer: reasoning and its budget, text, and calls of tools by their schemas.

Written in llguidance's dialect of Lark. Free text ends with the first trigger of a call (a lazy lexeme, or the special
token that it is), and from there on the call's own form must follow; a call that is demanded begins at once, behind
reasoning at most. Tokens count in a budget, so reasoning with one is written as any tokens but the one that ends it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.grammar import GrammarSpec, grammar_list, looks_like_tag, part
from server.parsing import harmony_parser as harmony
from server.parsing.answer_format import AnswerFormat, CallFormat, ReasoningFormat
from server.parsing.argument_kinds import Kinds, is_text, parameter_kinds
from server.parsing.callable_tools import CallableTool, CallableTools
from server.parsing.markers import first_part

ANY_TEXT = "/(?s:.*)/"
BLANK = r"\x20"  # what may stand between the tokens of a call's JSON, or nothing: templates show calls in one line


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The tokens of a vocabulary that markers may be: all that were added to it, by their text, and which are special.

    ends: the tokens that end an answer
    """

    added: Mapping[str, int]
    special: frozenset[str]
    ends: Sequence[int]

    @property
    def tags(self) -> frozenset[str]:
        """Those that are not special, and look like a tag: llguidance takes them for no text, either, while a model may
        spell them as text, too."""
        return frozenset(token for token in self.added if token not in self.special and looks_like_tag(token))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an answer has to follow. content: instead of free text; budget: tokens of reasoning, at most"""

    tools: CallableTools | None = None
    content: GrammarSpec | None = None
    budget: int | None = None
    is_thinking: bool = False  # the prompt has opened the reasoning


def answer_grammar(answer_format: AnswerFormat, wanted: Wanted, tokens: Tokens) -> GrammarSpec | None:
    """The grammar of an answer; None where any text will do.

    Raises ValueError for a budget where the end of reasoning is more than one token, and for a `content` of several
    grammars beside tools.
    """
    writer = _Writer(tokens)
    if answer_format.is_harmony:
        return _harmony_grammar(writer, wanted)
    calls, reasoning = answer_format.calls, answer_format.reasoning
    has_calls = wanted.tools is not None and calls is not None and _can_follow(calls, wanted.tools)
    if not has_calls and wanted.content is None and (wanted.budget is None or reasoning is None):
        return None
    if reasoning is None and not has_calls:
        return wanted.content
    if has_calls:
        assert calls is not None
        assert wanted.tools is not None
        body = _Calls(writer, calls, wanted.tools).body(wanted.content)
    else:
        body = ANY_TEXT if wanted.content is None else writer.content(wanted.content)
    start = body if reasoning is None else _behind_reasoning(writer, reasoning, body, wanted)
    return writer.grammar(start)


def _can_follow(calls: CallFormat, tools: CallableTools) -> bool:
    """Whether free text can be told from calls: not where any object may be one, unless a call is demanded."""
    return tools.must_call or not calls.is_bare or tools.is_strict


def _behind_reasoning(writer: _Writer, reasoning: ReasoningFormat, body: str, wanted: Wanted) -> str:
    writer.rules.append(f"body: {body}")
    close = reasoning.close.strip()
    blanks = json.dumps(reasoning.close[len(reasoning.close.rstrip()) :] or "\n")
    end = writer.tokens.added.get(close)
    if end is not None:
        others = ",".join(map(str, sorted({end, *writer.tokens.ends})))
        number = "*" if wanted.budget is None else f"{{0,{wanted.budget}}}"
        think = f"<[{end}]>" if wanted.budget == 0 else f"<[^{others}]>{number} <[{end}]>"
        writer.rules.append(f"think: {think} {blanks}?")
    elif wanted.budget is not None:
        raise ValueError(
            f"reasoning_max_tokens needs a model whose reasoning ends with one token, and this one's {close!r} is "
            "several; leave it out"
        )
    else:
        writer.rules.append(f"think: {writer.until(close)} {blanks}?")
    if wanted.is_thinking:
        return "think body"
    opened = writer.tokens.added.get(reasoning.open.strip())
    begin = writer.text(reasoning.open.strip()) if opened is None else f"<[{opened}]>"
    return f"{begin} think body | body"  # the token is taken for the opening, though it may be text as well


class _Writer:
    """Gathers rules, and the grammars that they refer to."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.rules: list[str] = []
        self._parts: list[dict[str, object]] = []
        self._names: dict[GrammarSpec, str] = {}
        self._tags = tokens.tags
        self._no_text = sorted(tokens.special | self._tags, key=len, reverse=True)

    def grammar(self, start: str) -> GrammarSpec:
        lark = "\n".join([f"start: {start}", *self.rules]) + "\n"
        return grammar_list([{"name": "answer", "lark_grammar": lark}, *self._parts])

    def text(self, text: str) -> str:
        """A text as Lark: tokens that are no text by their ids, the rest as strings. Empty: nothing."""
        written = []
        while text:
            place, token = self.first_token(text)
            if place:
                written.append(json.dumps(text[:place]))
            if token:
                by_id = f"<[{self.tokens.added[token]}]>"
                written.append(f"({by_id} | {json.dumps(token)})" if token in self._tags else by_id)
            text = text[place + len(token) :]
        return " ".join(written)

    def until(self, close: str) -> str:
        """Any text up to a marker, and the marker."""
        name = f"until_{len(self.rules)}"
        place, token = self.first_token(close)
        literal = token if token and not place else close[:place]
        if place or token in self._tags or not token:
            self.rules.append(f"{name}[lazy]: {ANY_TEXT} {json.dumps(literal)}")
        if place or not token:
            head = name
        else:
            by_id = f"{ANY_TEXT} <[{self.tokens.added[token]}]>"
            head = f"({by_id} | {name})" if token in self._tags else by_id
        return f"{head} {self.text(close[len(literal) :])}".strip()

    def first_token(self, text: str) -> tuple[int, str]:
        """Where the first token that is no text stands in a text, and which it is; at its end, if there is none."""
        places = [(text.find(token), -len(token), token) for token in self._no_text if token in text]
        place, _, token = min(places, default=(len(text), 0, ""))
        return place, token

    def is_special(self, text: str) -> bool:
        return text in self.tokens.special

    def content(self, spec: GrammarSpec) -> str:
        """A reference to another grammar."""
        if spec.kind == "grammars":
            raise ValueError("an answer cannot follow structural tags beside tools or reasoning; leave out one of them")
        name = self._names.get(spec)
        if name is None:
            name = self._names[spec] = f"part_{len(self._names)}"
            self._parts.append(part(spec, name))
        return f"@{name}"

    def arguments(self, tool: CallableTool) -> str:
        text = json.dumps(tool.schema, ensure_ascii=False)
        return self.content(GrammarSpec("json_schema", text, BLANK, is_lenient=not tool.is_strict))


@dataclass(slots=True)
class _Calls:
    """Writes calls in one format."""

    writer: _Writer
    calls: CallFormat
    tools: CallableTools
    _known: set[str] = field(default_factory=set)  # of the rules that are written once

    def body(self, content: GrammarSpec | None) -> str:
        """All behind reasoning: calls alone, or text in which they may come."""
        writer, calls = self.writer, self.calls
        opening = calls.opening.lstrip() or ""
        more = ""
        if self.tools.is_parallel:
            between = calls.between if calls.between.strip() else "; "
            more = f"({writer.text(between)} one)*"
        writer.rules.append(f"one: {self._one()}")
        if self.tools.must_call:
            return self._sequence(opening, more)
        if content is not None:
            return f"{self._sequence(opening, more)} | {writer.content(content)}"
        if calls.is_bare:
            writer.rules.append(r"plain_text: /[^{\s](?s:.*)/")
            return f"{self._sequence(opening, more)} | plain_text | " + '""'
        trigger = first_part(opening)
        writer.rules.append(f"text: {ANY_TEXT}")
        _, token = writer.first_token(trigger)
        if token and trigger.startswith(token):
            trigger = token
        writer.rules.append(f"tag: {writer.until(trigger)} {self._sequence(opening[len(trigger) :], more)}")
        return "tag* text" if self.tools.is_parallel else "tag | text"

    def _sequence(self, opening: str, more: str) -> str:
        written = [self.writer.text(opening), "one", more, self.writer.text(self.calls.closing.rstrip())]
        return " ".join(filter(None, written))

    def _one(self) -> str:
        if self.calls.kind == "json":
            key, arguments_key = json.dumps(self.calls.name_key), json.dumps(self.calls.arguments_key)
            rests = []
            for tool in self.tools.tools:
                head = f'{tool.name}", {arguments_key}: '
                rests.append(f"{json.dumps(head)} {self.writer.arguments(tool)}")
            begin = json.dumps(f'{{{key}: "')
            return f'{begin} ({" | ".join(rests)}) "}}"'
        return " | ".join(map(self._named, self.tools.tools))

    def _named(self, tool: CallableTool) -> str:
        head = self.writer.text(tool.name + self.calls.name_end)
        if self.calls.kind == "named":
            return f"{head} {self.writer.arguments(tool)}"
        if self.calls.kind == "tagged":
            return f"{head} {self._tags(tool)}".strip()
        return f"{head} {self._loose(tool)}"

    def _tags(self, tool: CallableTool) -> str:
        """The parameters that the schema knows: of a strict one each at most once, in its order."""
        kinds = parameter_kinds(tool.schema)
        properties, required = tool.schema.get("properties"), tool.schema.get("required")
        required = required if isinstance(required, list) else []
        written = []
        for key in kinds:
            schema = properties[key] if isinstance(properties, Mapping) else {}
            begin = self.writer.text(self.calls.key_open + key + self.calls.key_close)
            if is_text(kinds[key]):
                rest = self._value(schema)
            else:
                spec = GrammarSpec("json_schema", json.dumps(schema, ensure_ascii=False), is_lenient=not tool.is_strict)
                rest = f"{self.writer.content(spec)} {self.writer.text(self.calls.value_close)}"
            written.append((key, f"{begin} {rest}"))
        if tool.is_strict:
            return " ".join(text if key in required else f"({text})?" for key, text in written)
        return f"({' | '.join(text for _, text in written)})*" if written else ""

    def _value(self, schema: object) -> str:
        """The text of a value that is a string, up to what closes it."""
        close = self.calls.value_close
        values = schema.get("enum") if isinstance(schema, Mapping) else None
        if isinstance(values, list) and values and all(isinstance(value, str) and value for value in values):
            alternatives = " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
            return f"({alternatives}) {self.writer.text(close)}"
        return self.writer.until(close)

    def _loose(self, tool: CallableTool) -> str:
        """The parameters that the schema requires, in its order, and then the others, as the model likes."""
        kinds = parameter_kinds(tool.schema)
        properties, listed = tool.schema.get("properties"), tool.schema.get("required")
        required = [key for key in listed if key in kinds] if isinstance(listed, list) else []
        pairs = {key: f"{json.dumps(key + ':')} {self._loose_value(properties, key, kinds[key])}" for key in kinds}
        must = ' "," '.join(pairs[key] for key in required)
        may = " | ".join(pair for key, pair in pairs.items() if key not in required)
        inner = must
        if may:
            inner = f'{must} ("," ({may}))*' if must else f'(({may}) ("," ({may}))*)?'
        return f'"{{" {inner} "}}"'

    def _loose_value(self, properties: object, key: str, kinds: Kinds) -> str:
        """A value of some types; of the values that a schema lists, where these are all texts."""
        if "loose_value" not in self._known:
            self._known.add("loose_value")
            quote = self.writer.text(self.calls.quote)
            if self.writer.is_special(self.calls.quote):
                self.writer.rules.append(f"loose_string: {quote} {ANY_TEXT} {quote}")
            else:
                self.writer.rules.append(f"loose_rest[lazy]: {ANY_TEXT} {json.dumps(self.calls.quote)}")
                self.writer.rules.append(f"loose_string: {quote} loose_rest")
            self.writer.rules += [
                r"LOOSE_INTEGER: /-?(0|[1-9][0-9]{0,15})/",
                r"LOOSE_NUMBER: /-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,3})?/",
                r"LOOSE_KEY: /[A-Za-z0-9_\-. ]{1,64}:/",
                'loose_boolean: "true" | "false"',
                'loose_array: "[" (loose_value ("," loose_value)*)? "]"',
                'loose_object: "{" (LOOSE_KEY loose_value ("," LOOSE_KEY loose_value)*)? "}"',
                'loose_value: loose_string | LOOSE_NUMBER | loose_boolean | "null" | loose_array | loose_object',
            ]
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        values = schema.get("enum") if isinstance(schema, Mapping) else None
        if isinstance(values, list) and values and all(isinstance(value, str) and value for value in values):
            quote = self.writer.text(self.calls.quote)
            return f"{quote} ({' | '.join(json.dumps(value, ensure_ascii=False) for value in values)}) {quote}"
        rules = {
            "string": "loose_string", "integer": "LOOSE_INTEGER", "number": "LOOSE_NUMBER", "null": '"null"',
            "boolean": "loose_boolean", "array": "loose_array", "object": "loose_object",
        }  # fmt: skip
        kinds = kinds - {"integer"} if "number" in kinds else kinds
        found = [rules[kind] for kind in sorted(kinds) if kind in rules]
        return f"({' | '.join(found)})" if found else "loose_value"


def _harmony_grammar(writer: _Writer, wanted: Wanted) -> GrammarSpec | None:
    """Messages of reasoning, and of commentary where no call must come, and one at the end: a call or the answer."""
    tools = wanted.tools
    if tools is None and wanted.content is None and wanted.budget is None:
        return None
    if not writer.tokens.special.issuperset({harmony.CHANNEL, harmony.MESSAGE, harmony.END, harmony.START}):
        return None  # its tokens are none of this vocabulary, so it cannot be followed
    end = writer.tokens.added[harmony.END]
    structure = {writer.tokens.added[token] for token in harmony.TOKENS if token in writer.tokens.special}
    others = ",".join(map(str, sorted({*structure, *writer.tokens.ends})))
    number = "*" if wanted.budget is None else f"{{0,{wanted.budget}}}"
    again = f"<[{end}]> {writer.text(harmony.START + 'assistant')}"
    thought = f"<[^{others}]>{number} " if wanted.budget != 0 else ""
    writer.rules.append(f"thought: {writer.text(f'{harmony.CHANNEL}analysis{harmony.MESSAGE}')} {thought}{again}")
    before, ends = "thought", []
    if tools is not None:
        heads = [
            f"{json.dumps(tool.name + ' ')} {writer.text(f'{harmony.CONSTRAIN}json{harmony.MESSAGE}')} "
            f"{writer.arguments(tool)}"
            for tool in tools.tools
        ]
        to = writer.text(f"{harmony.CHANNEL}commentary to=functions.")
        writer.rules.append(f"call: {to} ({' | '.join(heads)})")
        ends.append("call")
    if tools is None or not tools.must_call:
        content = ANY_TEXT if wanted.content is None else writer.content(wanted.content)
        writer.rules.append(f"answer: {writer.text(f'{harmony.CHANNEL}final{harmony.MESSAGE}')} {content}")
        writer.rules.append(f"said: {writer.text(f'{harmony.CHANNEL}commentary{harmony.MESSAGE}')} {ANY_TEXT} {again}")
        before, ends = "(thought | said)", [*ends, "answer"]
    return writer.grammar(f"{before}* ({' | '.join(ends)})")
