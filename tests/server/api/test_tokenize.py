"""POST /tokenize and /detokenize, with and without /v1."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend

from tests.support.server_world import connect, make_world

PATHS = pytest.mark.parametrize("prefix", ["", "/v1"])


@PATHS
@pytest.mark.parametrize("key", ["prompt", "content"])
async def test_a_text_becomes_the_ids_that_a_completion_would_see(world, client, prefix: str, key: str) -> None:
    response = await client.post(prefix + "/tokenize", json={"model": "tiny", key: "héllo 🙂"})
    token_ids = world.tokenizer.encode("héllo 🙂", add_special_tokens=True)
    assert response.json() == {"count": len(token_ids), "max_model_len": 256, "tokens": token_ids}
    await client.post("/v1/completions", json={"model": "tiny", "prompt": "héllo 🙂"})
    assert world.engine.requests[0].prompt_token_ids == token_ids


@PATHS
async def test_ids_become_text(world, client, prefix: str) -> None:
    token_ids = [*world.tokenizer.encode("héllo 🙂", add_special_tokens=False), 1]
    response = await client.post(prefix + "/detokenize", json={"tokens": token_ids})
    assert response.json() == {"prompt": "héllo 🙂</s>", "content": "héllo 🙂</s>"}
    response = await client.post(prefix + "/detokenize", json={"tokens": token_ids, "skip_special_tokens": True})
    assert response.json()["prompt"] == "héllo 🙂"


async def test_long_and_empty_texts_are_fine(world, client) -> None:
    text = "hello world " * 2000
    response = await client.post("/tokenize", json={"prompt": text})
    assert world.tokenizer.decode(response.json()["tokens"]) == text
    assert (await client.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []
    assert (await client.post("/detokenize", json={"tokens": []})).json()["prompt"] == ""


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "content": "a"}, 400),
        ("/tokenize", {"prompt": 5}, 400),
        ("/tokenize", {"prompt": ["a"]}, 400),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404),
        ("/detokenize", {}, 400),
        ("/detokenize", {"tokens": "a"}, 400),
        ("/detokenize", {"tokens": [330]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [2**40]}, 400),
        ("/detokenize", {"tokens": [1.0]}, 400),
        ("/detokenize", {"tokens": [5], "model": "other"}, 404),
    ],
)
async def test_what_is_wrong_is_refused(client, path: str, body: dict, status: int) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == status
    assert response.json()["error"]["message"]


async def test_unknown_fields_are_named(world, client) -> None:
    response = await client.post("/tokenize", json={"prompt": "a", "bogus": 1})
    assert response.headers["x-ignored-fields"] == "bogus"
    world.configure({"server": {"strict": True}})
    assert (await client.post("/tokenize", json={"prompt": "a", "bogus": 1})).status_code == 400


async def test_tokens_are_shown_as_text_if_asked(world, client) -> None:
    plain = (await client.post("/tokenize", json={"prompt": "héllo 🙂"})).json()
    answer = (await client.post("/tokenize", json={"prompt": "héllo 🙂", "return_token_strs": True})).json()
    assert "token_strs" not in plain
    assert answer["tokens"] == plain["tokens"]
    assert answer["token_strs"] == [world.tokenizer.token_text(token_id) for token_id in plain["tokens"]]


async def test_a_client_can_count_tokens_by_itself(world, client) -> None:
    info = (await client.get("/tokenizer_info")).json()
    own = Backend.from_str(json.dumps(info["tokenizer_json"]))
    tokens = (await client.post("/tokenize", json={"prompt": "hello world 🙂"})).json()["tokens"]
    assert own.encode("hello world 🙂").ids == tokens
    assert (info["model_max_length"], info["special_tokens"]["eos_token"]) == (256, "</s>")
    assert "im_start" in info["chat_template"]


@PATHS
async def test_a_conversation_becomes_the_ids_that_a_chat_would_see(world, client, prefix: str) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "héllo 🙂"}]
    answer = (await client.post(prefix + "/tokenize", json={"messages": messages})).json()
    await client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, "max_tokens": 1})
    assert answer["tokens"] == world.engine.requests[0].prompt_token_ids
    closed = (await client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})).json()
    assert closed["count"] < answer["count"]
    for wrong in ({"messages": messages, "prompt": "a"}, {"messages": []}, {"messages": [{"role": "user"}]}):
        assert (await client.post("/tokenize", json=wrong)).status_code == 400


async def test_tools_are_what_the_template_says_of_them() -> None:
    template = "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{{ messages[0].content }}"
    world = make_world(template)
    body = {"messages": [{"role": "user", "content": "hi"}]}
    described = [{"type": "function", "function": {"name": name, "parameters": {"a": [1, None]}}} for name in "fg"]
    async with connect(world) as client:
        for given, text in ((described, "f;g;hi"), ([], "hi"), (None, "hi")):
            answer = await client.post("/tokenize", json=body | {"tools": given})
            assert world.tokenizer.decode(answer.json()["tokens"]) == text
        for wrong in ("f", ["f"], [1], {"a": 1}):
            assert (await client.post("/tokenize", json=body | {"tools": wrong})).status_code == 400
