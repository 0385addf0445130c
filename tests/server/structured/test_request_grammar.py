"""What requests ask for becomes the grammar of the engine's request, or a 400 that says which part is wrong."""

from __future__ import annotations

import json

import pytest

from engine.grammar import GrammarSpec

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
PLAIN = {"model": "tiny", "prompt": "hi", "max_tokens": 4}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}, "required": ["b"]}
WAYS = {
    "json_object": ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
    "llama.cpp's json_object": (
        {"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", json.dumps(SCHEMA),
    ),
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        "json_schema", json.dumps(SCHEMA),
    ),
    "no schema": ({"response_format": {"type": "json_schema", "json_schema": {}}}, "json_schema", "true"),
    "structured json": ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
    "json as text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", json.dumps(SCHEMA)),
    "guided_json": ({"guided_json": SCHEMA}, "json_schema", json.dumps(SCHEMA)),
    "regex": ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
    "guided_regex": ({"guided_regex": "a+"}, "regex", "a+"),
    "choice": ({"structured_outputs": {"choice": ["x", 'q"\n', "x"]}}, "lark", 'start: "x" | "q\\"\\n"'),
    "grammar": ({"structured_outputs": {"grammar": 'start: "a"+'}}, "lark", 'start: "a"+'),
    "gbnf": ({"guided_grammar": 'root ::= "a" | "b"'}, "lark", None),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_every_way_to_ask_reaches_the_engine_as_a_grammar(world, client, path: str, way: str) -> None:
    fields, kind, text = WAYS[way]
    response = await client.post(path, json=(CHAT if "chat" in path else PLAIN) | fields)
    assert response.status_code == 200, response.text
    assert "x-ignored-fields" not in response.headers
    grammar = world.engine.requests[-1].params.grammar
    assert grammar.kind == kind
    if text is not None:
        same = json.loads if kind == "json_schema" else str
        assert same(grammar.text) == same(text)
    if kind == "json_schema" and isinstance(json.loads(grammar.text), dict):
        assert list(json.loads(grammar.text)) == list(json.loads(text))  # their order is that of the answer


async def test_without_any_there_is_none(world, client) -> None:
    for fields in ({}, {"response_format": {"type": "text"}}, {"response_format": None}):
        assert (await client.post("/v1/chat/completions", json=CHAT | fields)).status_code == 200
        assert world.engine.requests[-1].params.grammar is None


async def test_options_of_json(world, client) -> None:
    async def grammar_of(**fields: object) -> GrammarSpec:
        response = await client.post("/v1/completions", json=PLAIN | fields)
        assert response.status_code == 200, response.text
        return world.engine.requests[-1].params.grammar

    assert (await grammar_of(guided_json=SCHEMA, guided_whitespace_pattern="[ ]{1,3}")).blanks == "[ ]{1,3}"
    assert (await grammar_of(structured_outputs={"json": SCHEMA, "disable_any_whitespace": True})).blanks is None
    closed = await grammar_of(structured_outputs={"json": SCHEMA, "disable_additional_properties": True})
    assert json.loads(closed.text)["additionalProperties"] is False
    not_strict = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}, "strict": False}}
    assert (await grammar_of(response_format=not_strict)).is_lenient


SCHEMA_FIELD = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("schema", "param", "reason"),
    [
        ({"not": {"type": "string"}}, ".properties.a.not", "the keyword not cannot be enforced"),
        ({"if": {}, "then": {}}, ".properties.a.if", "the keywords if, then cannot be enforced"),
        ({"type": "array", "uniqueItems": True}, ".properties.a.uniqueItems", "the keyword uniqueItems"),
        ({"anyOf": [{"type": "null"}, {"contains": {}}]}, ".properties.a.anyOf[1].contains", "the keyword contains"),
        ({"type": "string", "format": "phone"}, ".properties.a.format", "the keyword format .* 'phone'"),
        ({"type": "strin"}, ".properties.a.type", "the keyword type .* 'strin'"),
        ({"type": "string", "pattern": "(?=a)b"}, ".properties.a.pattern", "the keyword pattern .*look-around"),
        ({"$ref": "#/$defs/gone"}, ".properties.a.$ref", "points to '/\\$defs/gone', which is not there"),
        ({"$ref": "http://example.com/x"}, ".properties.a.$ref", "points to 'http://example.com/x'"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "", "required property 'a' is unsatisfiable"),
        (
            {"oneOf": [{"type": "object"}, {"type": "object", "minProperties": 3}]},
            ".properties.a.oneOf", "the keyword oneOf .* write anyOf",
        ),
    ],
    ids=str,
)  # fmt: skip
async def test_a_keyword_that_cannot_be_enforced_is_named_with_its_place(
    client, schema: dict[str, object], param: str, reason: str
) -> None:
    whole = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": whole}}}
    response = await client.post("/v1/chat/completions", json=CHAT | fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == SCHEMA_FIELD + param
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(error["message"])


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "exclude each other"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs.regex", "exclude each other"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
            "response_format.json_schema.schema",
            "should be an object or a valid boolean",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required"),
        ({"response_format": {"type": "jso"}}, "response_format", "'text', 'json_object', 'json_schema'"),
        ({"guided_json": 5}, "guided_json", "should be an object or a valid boolean or a valid string"),
        ({"structured_outputs": {}}, "structured_outputs", "needs one of json, json_object, regex"),
        ({"structured_outputs": {"grammar": "start: undefined"}}, "structured_outputs.grammar", "undefined"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        (
            {"structured_outputs": {"structural_tag": {}}},
            "structured_outputs.structural_tag",
            "structures must be a list",
        ),
    ],
    ids=str,
)
async def test_other_mistakes_are_said_in_their_field(
    client, fields: dict[str, object], param: str, reason: str
) -> None:
    response = await client.post("/v1/completions", json=PLAIN | fields)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(error["message"])


async def test_many_choices_of_a_large_grammar_are_refused_with_the_numbers(client) -> None:
    choices = [f"{i}" * 60 for i in range(4000)]
    response = await client.post("/v1/completions", json=PLAIN | {"guided_choice": choices, "n": 128})
    assert response.status_code == 400
    assert "128 choices that each follow a grammar of" in response.json()["error"]["message"]
