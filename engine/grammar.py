"""The grammar that an answer must follow, as it travels with a request.

The one type that the server, the journal and the engine share, and that whatever constrains an answer makes:
`response_format`, `structured_outputs`, tool calls. It is text alone, so a new engine process compiles it again and
comes to the same state from the tokens so far.

To make one, a schema, a regular expression or a Lark grammar is enough: `GrammarSpec("regex", "[0-9]+")`. Free text
with constrained parts behind triggers (tool calls) is written by `server/structured/structural_tags.py`. Put it into
`SamplingParams.grammar` after the server has checked it: what the engine cannot compile ends the request with an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from typing import Literal

import msgspec

GrammarKind = Literal["json_schema", "regex", "lark", "grammars"]
JSON_BLANKS = r"[\x20\x0A\x0D\x09]{1,32}"
"""What may stand between the tokens of JSON, besides nothing: indentation, but not blanks for ever."""
_LARK_LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|%json\s.*')


class GrammarSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """A language of texts, by its description.

    kind: what `text` is. json_schema: a JSON Schema, as JSON; regex: a regular expression of Rust's `regex` crate that
    the whole answer matches; lark: a grammar in llguidance's dialect of Lark, from `start`; grammars: llguidance's list
    of grammars that name each other, as JSON
    blanks: regular expression of the blanks between the tokens of a json_schema's JSON, besides none; None: none at all
    is_lenient: keywords of a json_schema that cannot be enforced are left out, instead of refused
    """

    kind: GrammarKind
    text: str
    blanks: str | None = JSON_BLANKS
    is_lenient: bool = False


def looks_like_tag(token: str) -> bool:
    """Whether llguidance takes an added token of this text for no text, special or not."""
    return token.startswith("<") and token.endswith(">")


def serialised(spec: GrammarSpec, special_tokens: Collection[str] = ()) -> str:
    """The grammar in llguidance's own form: `{"grammars": [...]}`.

    special_tokens: texts that the tokenizer would make one token of. Where a literal has one in it, nothing is forced:
    llguidance tokenises what it forces, and would ask for the special token in place of its characters.
    Raises ValueError for JSON that is no JSON, RecursionError for what is nested too deeply to be read.
    """
    parts = _parsed(spec.text) if spec.kind == "grammars" else [part(spec)]
    if isinstance(parts, list) and any(
        token in literals for literals in map(_literals, parts) for token in special_tokens
    ):
        parts = [_without_forcing(parts[0]), *parts[1:]]
    return json.dumps({"grammars": parts})


def _literals(part: dict[str, object]) -> str:
    """What a part of a grammar may spell, without backslashes. Names of tokens in Lark are no literals."""
    text = part.get("lark_grammar")
    found = _LARK_LITERAL.findall(text) if isinstance(text, str) else [json.dumps(part, ensure_ascii=False)]
    return "\n".join(found).replace("\\", "")


def _without_forcing(part: dict[str, object]) -> dict[str, object]:
    text = part.get("lark_grammar", f"start: %json {json.dumps(part.get('json_schema'))}")
    if "%llguidance" in str(text):  # options of its own
        return part
    kept = {key: value for key, value in part.items() if key != "json_schema"}
    return {**kept, "lark_grammar": f'%llguidance {{"no_forcing": true}}\n{text}'}


def part(spec: GrammarSpec, name: str | None = None) -> dict[str, object]:
    """The grammar as a member of a list of grammars, others of which may refer to it as `@name`. Errors as above.

    spec: of any kind but grammars
    """
    named: dict[str, object] = {} if name is None else {"name": name}
    if spec.kind == "json_schema":
        return {**named, "json_schema": _with_options(_parsed(spec.text), spec)}
    if spec.kind == "regex":
        return {**named, "lark_grammar": f"start: /{_in_slashes(spec.text)}/"}
    assert spec.kind == "lark", "a list of grammars is no member of another"
    return {**named, "lark_grammar": spec.text}


def grammar_list(parts: Iterable[dict[str, object]]) -> GrammarSpec:
    """A grammar of several parts, of which the first is the whole answer's."""
    return GrammarSpec("grammars", json.dumps(list(parts)))


def _with_options(schema: object, spec: GrammarSpec) -> object:
    """What llguidance reads beside the schema's own keywords; a schema that is only true or false has room for none."""
    if not isinstance(schema, dict):
        schema = {} if schema is True else {"anyOf": []} if schema is False else schema
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON Schema is an object, true or false, not {type(schema).__name__}")
    flexible = {"whitespace_pattern": spec.blanks} if spec.blanks is not None else {"whitespace_flexible": False}
    options: dict[str, object] = {**flexible, "lenient": spec.is_lenient}
    return {**schema, "x-guidance": options}


def _in_slashes(regex: str) -> str:
    from llguidance import regex_to_lark  # a library of 8 MB, for those who need it

    return regex_to_lark(regex)


def _parsed(text: str) -> object:
    return json.loads(text)
