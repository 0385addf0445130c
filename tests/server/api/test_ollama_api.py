"""Ollama's API: lines of JSON, each whole, and one that is done at the end."""

from __future__ import annotations

import json

import httpx
import pytest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "options": {"seed": 1, "num_predict": 20}}
GENERATE = {"model": "tiny", "prompt": "hello", "options": {"seed": 1, "num_predict": 20}}


async def lines(client, path: str, body: dict) -> list[dict]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/x-ndjson")
    assert response.text.endswith("\n")
    told = [json.loads(line) for line in response.text.splitlines()]
    assert [line.get("done", False) for line in told] == [False] * (len(told) - 1) + [True]
    return told


async def test_a_chat_comes_in_lines_and_whole(world, client) -> None:
    world.engine.say("naïve 你好 🙂")
    told = await lines(client, "/api/chat", CHAT)
    assert "".join(line["message"]["content"] for line in told) == "naïve 你好 🙂"
    assert told[-1]["done_reason"] == "stop"
    assert told[-1]["prompt_eval_count"] == len(world.engine.requests[0].prompt_token_ids)
    whole = (await client.post("/api/chat", json=CHAT | {"stream": False})).json()
    assert whole["message"] == {"role": "assistant", "content": "naïve 你好 🙂"}
    assert whole["eval_count"] == told[-1]["eval_count"]
    assert whole["total_duration"] >= whole["eval_duration"]


async def test_a_prompt_is_a_chat_of_one_message(world, client) -> None:
    world.engine.say("hi")
    told = await lines(client, "/api/generate", GENERATE | {"system": "be brief", "model": "tiny:latest"})
    assert "".join(line["response"] for line in told) == "hi"
    prompt = world.tokenizer.decode(world.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello")
    told = await lines(client, "/api/generate", GENERATE | {"options": {"num_predict": 1}})
    assert told[-1]["done_reason"] == "length"


@pytest.mark.parametrize("streams", [True, False])
async def test_what_asks_nothing_is_told_that_the_model_is_there(world, client, streams) -> None:
    for path, body, key in (("/api/generate", {}, "response"), ("/api/chat", {"messages": []}, "message")):
        response = await client.post(path, json={"model": "tiny", "stream": streams, "keep_alive": -1} | body)
        told = response.json()
        assert (response.status_code, told["done"], told["done_reason"], key in told) == (200, True, "load", True)
        assert (await client.post(path, json={"model": "unheard"} | body)).status_code == 404
    assert world.engine.requests == []


async def test_an_error_in_a_stream_is_its_last_line(world, client) -> None:
    world.engine.fail_after = 2
    response = await client.post("/api/chat", json=CHAT)
    assert set(json.loads(response.text.splitlines()[-1])) == {"error"}


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/api/chat", CHAT | {"messages": 5}, "messages"),
        ("/api/chat", CHAT | {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
        ("/api/chat", CHAT | {"options": {"temperature": "hot"}}, "temperature"),
        ("/api/generate", GENERATE | {"raw": True}, "raw"),
        ("/api/generate", GENERATE | {"suffix": "x"}, "suffix"),
    ],
)
def test_errors_are_in_ollamas_words(operate, path, body, named) -> None:
    with operate({}) as operation, httpx.Client(base_url=operation.url, timeout=20) as client:
        response = client.post(path, json=body)
        assert response.status_code == 400
        assert set(response.json()) == {"error"}
        assert named in response.json()["error"]
        assert client.post(path, json=body | {"model": "other"}).status_code in (400, 404)
        assert [tag["name"] for tag in client.get("/api/tags").json()["models"]] == ["tiny", "org/other-name"]
        assert client.get("/api/version").status_code == 200
