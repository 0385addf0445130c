"""Which JSON types a tool's parameters may have, by its schema; formats without quotes around values leave it open."""

from __future__ import annotations

import json
from collections.abc import Mapping

Kinds = frozenset[str]
ParameterKinds = Mapping[str, Kinds]
ANY: Kinds = frozenset()
_STRING = frozenset({"string"})
_PYTHON = {"True": "true", "False": "false", "None": "null"}  # as templates write what they do not turn into JSON
_MAX_DEPTH = 8


def parameter_kinds(schema: object) -> dict[str, Kinds]:
    """By parameter: the types that the schema of the arguments allows it. Empty: it does not say."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping):
        return {}
    return {str(name): _kinds(value, _MAX_DEPTH) for name, value in properties.items()}


def is_text(kinds: Kinds) -> bool:
    """Whether a value is a string, whatever it looks like."""
    return kinds in (ANY, _STRING)


def as_json(text: str, kinds: Kinds) -> str:
    """A value that was written without quotes, as the JSON that its parameter's type makes of it."""
    plain = _PYTHON.get(text.strip(), text.strip())
    kind = _kind_of_json(plain)
    if kind is None or (kinds and kind not in kinds and "string" in kinds):
        return json.dumps(text, ensure_ascii=False)
    return plain


def _kinds(schema: object, depth: int) -> Kinds:
    if not isinstance(schema, Mapping) or not depth:
        return ANY
    named = schema.get("type")
    if isinstance(named, str):
        return _widened({named})
    if isinstance(named, list):
        return _widened({name for name in named if isinstance(name, str)})
    values = schema.get("enum")
    if not isinstance(values, list):
        values = [schema["const"]] if "const" in schema else []
    found = {_kind_of(value) for value in values}
    for key in ("anyOf", "oneOf"):
        for other in schema[key] if isinstance(schema.get(key), list) else ():
            kinds = _kinds(other, depth - 1)
            if not kinds:
                return ANY
            found |= kinds
    return _widened(found)


def _widened(kinds: set[str]) -> Kinds:
    """A whole number is a number, too."""
    return frozenset(kinds | {"integer"} if "number" in kinds else kinds)


def _kind_of_json(text: str) -> str | None:
    try:
        return _kind_of(json.loads(text, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _kind_of(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    names = {int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]
