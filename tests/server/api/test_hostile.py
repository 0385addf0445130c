"""Whatever is sent: an answer or a 4xx with the error body, never a 5xx, and the server goes on."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.protocol.chat_fields import ChatBody
from server.protocol.request_fields import CompletionBody
from tests.support.server_world import connect, make_world

PATHS = {
    "/v1/completions": b'"model":"tiny","prompt":"hi","max_tokens":2',
    "/v1/chat/completions": b'"model":"tiny","messages":[{"role":"user","content":"hi"}],"max_tokens":2',
}
BOTH = pytest.mark.parametrize("path", PATHS)
JSON_HEADERS = {"content-type": "application/json"}

HOSTILE_FIELDS = [
    b'"temperature":NaN', b'"temperature":Infinity', b'"temperature":-Infinity', b'"temperature":1e999',
    b'"temperature":' + b"9" * 400, b'"seed":' + b"9" * 5000, b'"seed":1e400', b'"seed":-' + b"1" * 400,
    b'"n":1e2', b'"n":-0', b'"n":null', b'"n":[[[[1]]]]', b'"max_tokens":99999999999999999999',
    b'"user":"\\ud800"', b'"user":"\\udc00x"', b'"\\ud800":1', b'"user":"\\u0000"', b'"stop":"\\u0000"',
    b'"stop":"\\ud83d"', b'"cache_salt":"\\ud800"', b'"logit_bias":{"\\ud800":1}', b'"user":"\xff\xfe"',
    b'"stop":[' + b'"a",' * 100_000 + b'"a"]', b'"stop":"' + b"a" * 1_000_000 + b'"',
    b'"bad_words":[' + b'"a",' * 50_000 + b'"a"]', b'"stop_token_ids":[' + b"1," * 100_000 + b"1]",
    b'"allowed_token_ids":[' + b"1e9," * 1000 + b"1]", b'"metadata":' + b"[" * 5000 + b"]" * 5000,
    b'"metadata":' + b'{"a":' * 150 + b"1" + b"}" * 150, b'"x":' + b"[" * 190 + b"]" * 190,
    b'"x":' + b'{"a":' * 100_000, b'"logit_bias":{' + b",".join(b'"%d":"x"' % i for i in range(50_000)) + b"}",
    b'"logit_bias":{' + b",".join(b'"%d":101' % i for i in range(200_000)) + b"}",
    b'"chat_template_kwargs":{' + b",".join(b'"%d":[]' % i for i in range(200_000)) + b"}",
    b'"messages":[' + b",".join([b'{"role":"user","content":[' + b"1," * 1000 + b"1]}"] * 1000) + b"]",
    b'"tools":[' + b"1," * 300_000 + b"1]", b'"modalities":[' + b"1," * 300_000 + b"1]",
    b'"prompt":[' + b"-1," * 100_000 + b"1]", b'"prompt":' + b"[[1]," * 3 + b"[1]", b'"stream":"true"',
    b'"messages":[' + b'{"role":"user","content":"a"},' * 5000 + b'{"role":"user","content":"a"}]',
    b'"messages":[{"role":"user","content":[' + b'{"type":"text","text":"a"},' * 5000 + b"1]}]",
    b'"chat_template_kwargs":{"__class__":1,"self":2,"caller":3,"loop":4,"range":5}',
    b'"chat_template_kwargs":{"namespace":1,"raise_exception":2,"m":3,"messages ":1}',
    b'"chat_template_kwargs":{"conversations":1}', b'"chat_template_kwargs":{"return_assistant_tokens_mask":true}',
    b'"model":""', b'"model":"' + b"m" * 100_000 + b'"', b'"model":"\\u202e"', b'"request_id":"../../etc"',
    b'"timeout":1e-320', b'"timeout":0.0000001', b'"priority":-9999999999', b'"max_tokens":0.0', b'"top_p":5e-324',
    b'"repetition_penalty":5e-324', b'"temperature":5e-324', b'"min_p":-0.0', b'"":{}', b'"a\\r\\nb: c":1',
]  # fmt: skip


@BOTH
@pytest.mark.parametrize("field", HOSTILE_FIELDS, ids=lambda field: repr(field[:40]))
async def test_hostile_fields_never_break_the_server(world, client, path: str, field: bytes) -> None:
    for content in (b"{" + PATHS[path] + b"," + field + b"}", b"{" + field + b"," + PATHS[path] + b"}"):
        response = await client.post(path, content=content, headers=JSON_HEADERS)
        check(response)
    await still_alive(world, client)


@BOTH
@pytest.mark.parametrize(
    "content",
    [b"", b" ", b"null", b"[]", b"5", b'"a"', b"{", b"{]", b"\xff", b"\xef\xbb\xbf{}", b"{}" * 2, b"[" * 10**6,
     b'{"model":"tiny"', b"NaN", b"\x00", b"{'a':1}", "{}".encode("utf-16")],
)  # fmt: skip
async def test_bodies_that_are_no_request_are_400(client, path: str, content: bytes) -> None:
    response = await client.post(path, content=content, headers=JSON_HEADERS)
    check(response)
    assert response.status_code == 400


@BOTH
@pytest.mark.parametrize(
    "media_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json", "a" * 1000]
)
async def test_other_content_types_are_400(client, path: str, media_type: str) -> None:
    headers = {"content-type": media_type} if media_type else {}
    response = await client.post(path, content=b"{" + PATHS[path] + b"}", headers=headers)
    check(response)
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


@BOTH
@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"])
async def test_json_under_all_its_names_is_taken(client, path: str, media_type: str) -> None:
    content = b"{" + PATHS[path] + b"}"
    response = await client.post(path, content=content, headers={"content-type": media_type})
    assert response.status_code == 200


async def test_of_duplicate_keys_the_last_one_counts(client) -> None:
    content = b'{"model":"none","prompt":"a","max_tokens":9,"max_tokens":2,"model":"tiny"}'
    response = await client.post("/v1/completions", content=content, headers=JSON_HEADERS)
    assert response.json()["usage"]["completion_tokens"] == 2


@pytest.fixture(scope="module")
def lasting_world():
    return make_world()


def values() -> st.SearchStrategy:
    """Mostly values near the ones that are meant, sometimes anything that JSON can say."""
    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 30), st.integers(), st.floats(), st.floats(0, 2), st.text(max_size=8),
        st.sampled_from(["text", "user", "auto", "a", "5", "tiny"]),
    )  # fmt: skip
    names = ["role", "content", "type", "text", "5", "num_drafts", "enabled"]
    keys = st.one_of(st.text(max_size=4), st.sampled_from(names))
    return st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))


@BOTH
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_body_of_known_fields_breaks_the_server(path: str, data, lasting_world) -> None:
    model = CompletionBody if path == "/v1/completions" else ChatBody
    fields = data.draw(st.dictionaries(st.sampled_from(sorted(model.model_fields)), values(), max_size=5))
    body = json.loads(b"{" + PATHS[path] + b"}") | fields | data.draw(st.sampled_from([{}, {"stream": True}]))

    async def send() -> None:
        async with connect(lasting_world) as client:
            response = await client.post(path, content=json.dumps(body).encode(), headers=JSON_HEADERS)
            check(response)
            await still_alive(lasting_world, client)

    asyncio.run(send())


def check(response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert len(response.content) < 2000
    assert all(len(value) < 9000 and "\n" not in value for value in response.headers.values())


async def still_alive(world, client) -> None:
    """Nothing is left behind, everything was counted, and the next request works."""
    assert world.engine.running == set()
    assert len(world.state.active_requests) == 0
    assert world.metrics.num_arrived == len(world.metrics.outcomes)
    response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert response.status_code == 200
