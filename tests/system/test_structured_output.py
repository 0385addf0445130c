"""Structured output over HTTP, from the request to the engine's process and through its death."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import jsonschema_rs

from tests.support.schemas import REFUSED, SCHEMAS

KEYWORDS = [
    "type", "type", "enum", "const", "minLength", "maxLength", "pattern", "minimum", "maximum", "items", "properties",
    "required", "anyOf", "allOf", "oneOf", "not", "$ref", "format", "minItems", "maxItems", "additionalProperties",
]  # fmt: skip
TYPES = ["string", "object", "integer", "array", "null", "number"]
VALUES = [-3, 0, 4, "^a+$", "#", "date", ["a", 1], None, True, 1e308]
NAMES = [name for name in SCHEMAS if name != "formats"]


def _body(index: int, **fields: object) -> dict[str, object]:
    name = NAMES[index % len(NAMES)]
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMAS[name], "strict": True}}
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"question {index}"}],
        "max_tokens": 400,
        "seed": index,
        "response_format": form,
        **fields,
    }


async def _ask(client: httpx.AsyncClient, index: int, **fields: object) -> tuple[str, str]:
    response = await client.post("/v1/chat/completions", json=_body(index, **fields))
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["message"]["content"], choice["finish_reason"]


async def _stream(client: httpx.AsyncClient, index: int) -> tuple[str, str]:
    text, reasons = "", []
    async with client.stream("POST", "/v1/chat/completions", json=_body(index, stream=True)) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                    reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    (reason,) = reasons
    return text, reason


async def _all(url: str, count: int) -> list[tuple[str, str]]:
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=100)) as client:
        return await asyncio.gather(*(_ask(client, i) if i % 2 else _stream(client, i) for i in range(count)))


async def test_answers_follow_their_schemas_and_survive_the_engine(start_server) -> None:
    with start_server("--set", "speculation.method=ngram") as server:
        expected = await _all(server.url, 30)
        for index, (text, reason) in enumerate(expected):
            schema = SCHEMAS[NAMES[index % len(NAMES)]]
            if reason == "stop":
                assert jsonschema_rs.validator_for(schema).is_valid(json.loads(text)), text
        assert sum(reason == "stop" for _, reason in expected) > 24
        running = asyncio.create_task(_all(server.url, 30))
        await asyncio.to_thread(server.wait_for, lambda: server.metric("peregrine_requests_running") > 1, 30)
        server.engine_process.kill()
        assert await running == expected
        assert server.metric("peregrine_grammars_total", outcome="compiled") == len(NAMES)
        assert server.metric("peregrine_grammars_total", outcome="cached") == 60 - len(NAMES)
        assert server.metric("peregrine_grammar_compile_seconds_count") == len(NAMES)
        await _check_everything_else(server.url)


async def _check_everything_else(url: str) -> None:
    """One server for all of it: starting one takes seconds."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        await _choices_differ(client)
        for name, (schema, keyword) in REFUSED.items():
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"anyOf": [schema]}}}
            response = await client.post("/v1/chat/completions", json=_body(0, response_format=form))
            assert response.status_code == 400, name
            assert response.json()["error"]["param"] == f"response_format.json_schema.schema.anyOf[0].{keyword}"
        text, reason = await _ask(client, 0, max_tokens=3)
        assert reason == "length"
        assert text.startswith("{")
        await _fuzz(client)
        assert (await client.get("/readyz")).status_code == 200
        assert (await _ask(client, 1))[1] == "stop"


async def _choices_differ(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": "x", "seed": 5, "max_tokens": 40, "n": 8, "guided_regex": "[a-f]{6,12}"}
    response = await client.post("/v1/completions", json=body)
    texts = [choice["text"] for choice in response.json()["choices"]]
    assert len(set(texts)) > 4
    assert all(6 <= len(text) <= 12 and set(text) <= set("abcdef") for text in texts)
    one = await client.post("/v1/completions", json=body | {"n": 1})
    assert one.json()["choices"][0]["text"] == texts[0]


async def _fuzz(client: httpx.AsyncClient) -> None:
    """Schemas, expressions and grammars put together at random: an answer or a 400, never a 5xx."""
    rng = random.Random(0)
    bodies = [{"model": "tiny", "prompt": "x", "max_tokens": 8, "seed": i, **_random_fields(rng)} for i in range(150)]
    statuses = []
    for start in range(0, len(bodies), 10):
        found = await asyncio.gather(
            *(client.post("/v1/completions", json=body) for body in bodies[start : start + 10])
        )
        for body, response in zip(bodies[start : start + 10], found, strict=True):
            assert response.status_code in (200, 400), (body, response.text)
            statuses.append(response.status_code)
    assert 20 < statuses.count(200) < 140


def _random_fields(rng: random.Random) -> dict[str, object]:
    kind = rng.choice(["schema", "schema", "regex", "lark", "choice", "tag"])
    if kind == "schema":
        return {"guided_json": _random_schema(rng, 0)}
    if kind == "regex":
        return {
            "guided_regex": "".join(rng.choice([*"ab[]()|*+?{}.^$\\d", "{2,3}", "[a-z]", "(?:", "é"]) for _ in range(6))
        }
    if kind == "lark":
        parts = ["start", ":", '"a"', "X", "|", "\n", "X: /[ab]+/", "(", ")", "*", "%json {}", "<[1]>", "start: "]
        return {"structured_outputs": {"grammar": "start: " + " ".join(rng.choices(parts, k=rng.randrange(1, 8)))}}
    if kind == "choice":
        return {
            "guided_choice": [
                "".join(rng.choices('ab"\\\n é🙂', k=rng.randrange(5))) for _ in range(rng.randrange(1, 5))
            ]
        }
    tag = {"begin": rng.choice(["<a>", "a", ""]), "schema": _random_schema(rng, 2), "end": rng.choice(["</a>", ""])}
    return {"response_format": {"type": "structural_tag", "structures": [tag], "triggers": [rng.choice(["<a", "a"])]}}


def _random_schema(rng: random.Random, depth: int) -> object:
    schema: dict[str, object] = {}
    for _ in range(rng.randrange(4)):
        key = rng.choice(KEYWORDS)
        inner = {} if depth > 2 else _random_schema(rng, depth + 1)
        schema[key] = rng.choice([rng.choice(TYPES), rng.choice(VALUES), inner, [inner], {"a": inner}])
    return schema
