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
from collections.abc import Iterable
from typing import Literal

import msgspec

GrammarKind = Literal["json_schema", "regex", "lark", "grammars"]
JSON_BLANKS = r"[\x20\x0A\x0D\x09]{1,32}"
"""What may stand between the tokens of JSON, besides nothing: indentation, but not blanks for ever."""


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


def serialised(spec: GrammarSpec) -> str:
    """The grammar in llguidance's own form: `{"grammars": [...]}`.

    Raises ValueError for JSON that is no JSON, RecursionError for what is nested too deeply to be read.
    """
    if spec.kind == "grammars":
        return json.dumps({"grammars": _parsed(spec.text)})
    return json.dumps({"grammars": [part(spec)]})


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
