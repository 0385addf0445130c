"""Why a grammar is refused, in words that say what to change, and where in a schema that is."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator

from engine.grammar import GrammarSpec

JsonPath = list[str | int]

_UNIMPLEMENTED = re.compile(r"Unimplemented keys: (\[.*\])")
_NAMED = re.compile(r"(?:Unknown|Unsupported|Unimplemented) format: ?'?\"?([^'\"]*)|Invalid type: (.*)")
_POINTED = re.compile(r"(?:Pointer|Resource) '([^']*)'")
_ONE_SCHEMA = (
    "additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not",
    "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
MAX_SHOWN = 500  # characters of a reason, which may quote all that a client sent


def explain(reason: str, spec: GrammarSpec) -> tuple[str, JsonPath]:
    """The reason in words, and the path of the keyword in a JSON Schema that it speaks of, or of the whole."""
    if spec.kind != "json_schema":
        return reason[:MAX_SHOWN], []
    schema = _read(spec.text)
    if found := _UNIMPLEMENTED.search(reason):
        keys = [str(key) for key in json.loads(found[1])]
        path = _find(schema, lambda node: next((key for key in keys if key in node), None))
        words = f"the keyword {keys[0]}" if len(keys) == 1 else f"the keywords {', '.join(keys)}"
        return f"{words} cannot be enforced: leave it out", path
    if "oneOf" in reason:
        path = _find(schema, lambda node: "oneOf" if "oneOf" in node else None)
        return "the keyword oneOf cannot be enforced where several of its schemas may fit: write anyOf", path
    if found := _NAMED.search(reason):
        key, value = ("format", found[1]) if found[1] is not None else ("type", found[2])
        path = _find(schema, lambda node: key if value in str(node.get(key)) else None)
        return f"the keyword {key} cannot be enforced with the value {value[:100]!r}: leave it out", path
    if found := _POINTED.search(reason):
        target = found[1]
        path = _find(schema, lambda node: "$ref" if str(node.get("$ref", "")).endswith(target) else None)
        return f"the keyword $ref points to {target[:200]!r}, which is not there: only parts of the schema are", path
    if "regex" in reason or "look-around" in reason:
        path = _find(schema, lambda node: "pattern" if "pattern" in node else None)
        return f"the keyword pattern is no regular expression that can be enforced: {reason[:MAX_SHOWN]}", path
    return reason[:MAX_SHOWN], []


def path_text(path: JsonPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:100]}" for part in path)


def _read(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _find(schema: object, wanted: Callable[[dict[str, object]], str | None]) -> JsonPath:
    """The path of the first keyword that is wanted of a schema, or of the whole."""
    for path, node in schema_nodes(schema):
        key = wanted(node)
        if key is not None:
            return [*path, key]
    return []


def schema_nodes(schema: object) -> Iterator[tuple[JsonPath, dict[str, object]]]:
    """Every schema inside a schema, itself first, with its path. What only looks like one, in an enum, is left out."""
    waiting: deque[tuple[JsonPath, object]] = deque([([], schema)])
    while waiting:
        path, node = waiting.popleft()
        if not isinstance(node, dict):
            continue
        yield path, node
        for key, inner in node.items():
            if key in _ONE_SCHEMA and isinstance(inner, dict):
                waiting.append(([*path, key], inner))
            elif key in _LISTS and isinstance(inner, list):
                waiting += [([*path, key, place], one) for place, one in enumerate(inner)]
            elif key in _MAPS and isinstance(inner, dict):
                waiting += [([*path, key, name], one) for name, one in inner.items()]
