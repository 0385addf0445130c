"""What the fields of a request ask for, as one grammar: `response_format`, `structured_outputs`, `guided_json`, ..."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from engine.grammar import JSON_BLANKS, GrammarSpec
from engine.ipc.messages import ModelInfo
from server.errors import bad_request
from server.off_loop import off_loop
from server.protocol.request_fields import RequestFields
from server.protocol.structured_fields import (
    JsonObjectFormat,
    JsonSchemaFormat,
    StructuralTagFormat,
    StructuredOutputs,
    TextFormat,
)
from server.structured.grammar_checker import GrammarChecker
from server.structured.schema_errors import schema_nodes
from server.structured.tag_formats import tag_grammar
from server.text.tokenizer import Tokenizer

ANY_OBJECT: dict[str, object] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class _Asked:
    """One way to ask for a structure. param: its field; value: what stands there; kind: how it is read"""

    param: str
    kind: str  # schema, regex, choice, grammar, structural_tag
    value: object
    is_lenient: bool = False


async def read_grammar(
    body: RequestFields, checker: GrammarChecker, *, model: ModelInfo, tokenizer: Tokenizer
) -> GrammarSpec | None:
    """The grammar that a request asks for, which the engine can follow; None: none. Raises ApiError."""
    asked = [*_of_response_format(body), *_of_structured_outputs(body.structured_outputs), *_of_guided(body)]
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(one.param for one in asked)
        raise bad_request(f"{names} exclude each other: an answer follows one grammar", param=asked[1].param)
    (one,) = asked
    try:
        spec = await off_loop(_spec, one, body, tokenizer.special_texts)
    except (ValueError, OverflowError, RecursionError, TypeError) as error:
        raise bad_request(f"{one.param}: {str(error)[:500]}", param=one.param) from error
    return await checker.check(spec, model, param=one.param)


def _of_response_format(body: RequestFields) -> list[_Asked]:
    asked = body.response_format
    if asked is None or isinstance(asked, TextFormat):
        return []
    if isinstance(asked, JsonObjectFormat):
        if asked.given_schema is None:
            return [_Asked("response_format", "schema", ANY_OBJECT)]
        return [_Asked("response_format.schema", "schema", asked.given_schema)]
    if isinstance(asked, JsonSchemaFormat):
        named = asked.json_schema
        schema = True if named.given_schema is None else named.given_schema
        return [_Asked("response_format.json_schema.schema", "schema", schema, is_lenient=named.strict is False)]
    return [_Asked("response_format", "structural_tag", _tag_value(asked))]


def _tag_value(asked: StructuralTagFormat) -> dict[str, object]:
    parts = {"format": asked.format, "structures": asked.structures, "triggers": asked.triggers}
    return {name: part for name, part in parts.items() if part is not None}


def _of_structured_outputs(asked: StructuredOutputs | None) -> list[_Asked]:
    if asked is None:
        return []
    found = [
        ("json", "schema", asked.given_json),
        ("json_object", "schema", ANY_OBJECT if asked.json_object else None),
        ("regex", "regex", asked.regex),
        ("choice", "choice", asked.choice),
        ("grammar", "grammar", asked.grammar),
        ("structural_tag", "structural_tag", asked.structural_tag),
    ]
    ways = [_Asked(f"structured_outputs.{name}", kind, value) for name, kind, value in found if value is not None]
    if not ways:
        names = ", ".join(name for name, _, _ in found)
        raise bad_request(f"structured_outputs needs one of {names}", param="structured_outputs")
    return ways


def _of_guided(body: RequestFields) -> list[_Asked]:
    found = [
        ("guided_json", "schema", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "choice", body.guided_choice),
        ("guided_grammar", "grammar", body.guided_grammar),
    ]
    return [_Asked(name, kind, value) for name, kind, value in found if value is not None]


def _spec(asked: _Asked, body: RequestFields, special_texts: Collection[str]) -> GrammarSpec:
    """ValueError for what is no schema, OverflowError for integers of more than 64 bits."""
    value = asked.value
    if asked.kind == "schema":
        options = body.structured_outputs
        schema = _parsed(value) if isinstance(value, str) else value
        if options is not None and options.disable_additional_properties:
            _close_objects(schema)
        return GrammarSpec("json_schema", _dumped(schema), _blanks(body), asked.is_lenient)
    if asked.kind == "structural_tag":
        given = _parsed(value) if isinstance(value, str) else value
        return tag_grammar(given, special_texts, blanks=_blanks(body))
    if asked.kind == "choice":
        assert isinstance(value, list)
        return GrammarSpec("lark", "start: " + " | ".join(json.dumps(one) for one in dict.fromkeys(value)))
    assert isinstance(value, str)
    return GrammarSpec("regex" if asked.kind == "regex" else "lark", value)


def _blanks(body: RequestFields) -> str | None:
    options = body.structured_outputs
    if options is not None and options.disable_any_whitespace:
        return None
    given = body.guided_whitespace_pattern if options is None else options.whitespace_pattern
    return JSON_BLANKS if given is None else given


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error


def _dumped(schema: object) -> str:
    return msgspec.json.encode(schema).decode()


def _close_objects(schema: object) -> None:
    for _, node in schema_nodes(schema):
        if "properties" in node and "additionalProperties" not in node:
            node["additionalProperties"] = False
