"""JSON Schemas of the kinds that people send: those that are enforced, and those that are refused and why."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def closed(properties: dict[str, Any], **others: Any) -> Schema:
    """An object of these properties, all of them required, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **others,
    }


SHORT = {"type": "string", "maxLength": 8}
TREE = {
    "$defs": {
        "node": closed(
            {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
            }
        )
    },
    "$ref": "#/$defs/node",
}

ENDLESS = {"a map"}  # whose answers need not end: a key may be of any length
SCHEMAS: dict[str, Schema] = {
    "flat object": closed(
        {"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 120}, "ok": {"type": "boolean"}}
    ),
    "optional properties": {
        "type": "object",
        "properties": {"a": SHORT, "b": {"type": "null"}, "c": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "enums of all types": closed(
        {"one": {"enum": ["red", 5, None, True, [1, "x"], {"k": 1.5}]}, "two": {"const": "fixed"}}
    ),
    "nested arrays": closed(
        {
            "matrix": {
                "type": "array",
                "minItems": 2,
                "maxItems": 3,
                "items": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 3,
                    "items": {"type": "integer", "minimum": -9, "maximum": 9},
                },
            }
        }
    ),
    "tuples": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, SHORT, {"const": 3}],
        "items": False,
        "minItems": 3,
    },
    "patterns": closed(
        {
            "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
            "tail": {"type": "string", "pattern": "^x[yz]*z$", "maxLength": 9},
        }
    ),
    "integers": closed(
        {
            "a": {"type": "integer", "minimum": 17, "maximum": 1023},
            "b": {"type": "integer", "exclusiveMinimum": -5, "exclusiveMaximum": 0},
            "c": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
        }
    ),
    "numbers": closed(
        {
            "a": {"type": "number", "minimum": -1.5, "maximum": 2.25},
            "b": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        }
    ),
    "anyOf": closed(
        {
            "value": {
                "anyOf": [
                    {"type": "integer", "minimum": 0, "maximum": 99},
                    {"type": "null"},
                    closed({"deep": {"const": True}}),
                ]
            }
        }
    ),
    "oneOf with a discriminator": {
        "oneOf": [
            closed({"kind": {"const": "circle"}, "radius": {"type": "integer", "minimum": 1, "maximum": 50}}),
            closed({"kind": {"const": "square"}, "side": {"type": "integer", "minimum": 1, "maximum": 50}}),
        ]
    },
    "allOf": {
        "allOf": [
            {
                "type": "object",
                "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 50}},
                "required": ["a"],
            },
            {
                "properties": {"a": {"maximum": 9}, "b": {"type": "boolean"}},
                "required": ["b"],
                "additionalProperties": False,
            },
        ]
    },
    "definitions": {
        "$defs": {
            "point": closed(
                {
                    "x": {"type": "integer", "minimum": 0, "maximum": 9},
                    "y": {"type": "integer", "minimum": 0, "maximum": 9},
                }
            )
        },
        **closed({"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}),
    },
    "recursion": TREE,
    "a map": {
        "type": "object",
        "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9},
        "minProperties": 1,
        "maxProperties": 3,
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^k[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "formats": closed(
        {
            "date": {"type": "string", "format": "date"},
            "time": {"type": "string", "format": "date-time"},
            "ip": {"type": "string", "format": "ipv4"},
            "id": {"type": "string", "format": "uuid"},
        }
    ),
    "unicode": closed(
        {
            "naïve é": {"enum": ["größe", "你好", "🙂"]},
            "键": {"type": "string", "maxLength": 5},
            'quote"\\': {"const": "tab\tand\nline"},
        }
    ),
    "lengths": closed(
        {
            "code": {"type": "string", "minLength": 3, "maxLength": 3},
            "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
        }
    ),
    "an enum alone": {"enum": ["yes", "no", "maybe"]},
    "a string alone": {"type": "string", "minLength": 1, "maxLength": 12},
    "several types": closed({"v": {"type": ["integer", "boolean", "null"], "minimum": 0, "maximum": 9}}),
    "descriptions change nothing": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "T",
        "description": "d",
        **closed({"x": {"type": "boolean", "title": "X", "default": True, "examples": [False], "deprecated": True}}),
    },
    "a large enum": closed({"city": {"enum": [f"city number {i}" for i in range(500)]}}),
    "many properties": closed({f"field_{i}": {"type": "boolean"} for i in range(12)}),
}

REFUSED: dict[str, tuple[Schema, str]] = {
    "not": ({"not": {"type": "string"}}, "not"),
    "if": ({"if": {"type": "string"}, "then": {"maxLength": 3}}, "if"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "contains": ({"type": "array", "contains": {"const": 1}}, "contains"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    "unevaluatedProperties": ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
    "an unknown format": ({"type": "string", "format": "phone-number"}, "format"),
    "look-around": ({"type": "string", "pattern": "^(?!x).*$"}, "pattern"),
    "an unknown type": ({"type": "text"}, "type"),
    "a reference elsewhere": ({"$ref": "https://example.com/schema.json"}, "$ref"),
}
