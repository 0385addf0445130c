"""/v1/responses: what becomes of items, what the answers say, and which events tell it."""

from __future__ import annotations

import json

import httpx
import pytest

from server.generation.answer_store import AnswerStore, StoredAnswer
from tests.support.event_grammar import read_response
from tests.support.server_world import connect

PATH = "/v1/responses"
BODY = {"model": "tiny", "input": "hello", "seed": 1, "max_output_tokens": 20}
ADD = {
    "type": "function", "name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}},
    "strict": True,
}  # fmt: skip


async def ask(client, **fields) -> dict:
    response = await client.post(PATH, json=BODY | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client, **fields) -> tuple[dict, list[dict]]:
    response = await client.post(PATH, json=BODY | fields | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return read_response(response.text)


async def refuse(client, status: int = 400, **fields) -> dict:
    response = await client.post(PATH, json=BODY | fields)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def prompt_of(world) -> str:
    return world.tokenizer.decode(world.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


@pytest.fixture
def storing(world):
    world.state.answers = AnswerStore(max_answers=3, max_bytes=100_000)
    return world


async def test_an_answer_has_everything_that_openai_says_it_has(world, client) -> None:
    world.engine.say("hi there")
    answer = await ask(client, metadata={"a": "b"}, temperature=0.5, instructions="be brief")
    assert answer["id"].startswith("resp_")
    [item] = answer["output"]
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "hi there", "annotations": [], "logprobs": []}],
    }
    told = ("object", "status", "metadata", "temperature", "instructions", "store", "error", "incomplete_details")
    assert {name: answer[name] for name in told} == {
        "object": "response", "status": "completed", "metadata": {"a": "b"}, "temperature": 0.5,
        "instructions": "be brief", "store": False, "error": None, "incomplete_details": None,
    }  # fmt: skip
    num_prompt = len(world.engine.requests[0].prompt_token_ids)
    assert answer["usage"]["input_tokens"] == num_prompt
    assert answer["usage"]["total_tokens"] == num_prompt + answer["usage"]["output_tokens"]
    assert world.metrics.outcomes == ["stop"]


async def test_a_stream_says_what_the_answer_says(world, client) -> None:
    world.engine.say("naïve café 你好 🙂")
    whole = await ask(client)
    streamed, events = await stream(client)
    assert streamed["output"][0]["content"] == whole["output"][0]["content"]
    assert streamed["usage"] == whole["usage"]
    assert sum(event["type"] == "response.output_text.delta" for event in events) > 3


@pytest.mark.parametrize("streams", [False, True])
async def test_an_answer_that_is_cut_off_is_incomplete(world, client, streams) -> None:
    answer = (await stream(client, max_output_tokens=3))[0] if streams else await ask(client, max_output_tokens=3)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["usage"]["output_tokens"] == 3


@pytest.mark.parametrize("streams", [False, True])
async def test_an_answer_without_a_word_has_an_item_all_the_same(world, client, streams) -> None:
    world.engine.say("")
    answer = (await stream(client))[0] if streams else await ask(client)
    assert [part["text"] for part in answer["output"][0]["content"]] == [""]


async def test_log_probabilities_come_with_the_text(world, client) -> None:
    world.engine.say("hi there")
    streamed, _ = await stream(client, top_logprobs=2)
    [part] = streamed["output"][0]["content"]
    assert "".join(one["token"] for one in part["logprobs"]) == "hi there</s>"
    assert all(len(one["top_logprobs"]) == 2 for one in part["logprobs"])
    asked = await ask(client, include=["message.output_text.logprobs"])
    assert asked["output"][0]["content"][0]["logprobs"][0]["top_logprobs"] == []


@pytest.mark.parametrize("streams", [False, True])
async def test_answers_that_are_put_into_words_off_the_event_loop_are_kept_whole(
    storing, client, streams, monkeypatch
) -> None:
    monkeypatch.setattr("server.generation.streaming.LARGE_DELTA", 10)
    storing.engine.script = lambda request: [70, 71, 72] * 20
    storing.engine.step_size = 25
    fields = {"top_logprobs": 20, "max_output_tokens": 60}
    answer = (await stream(client, **fields))[0] if streams else await ask(client, **fields)
    assert len(answer["output"][0]["content"][0]["logprobs"]) == 60
    assert (await client.get(f"{PATH}/{answer['id']}")).json() == answer
    await ask(client, previous_response_id=answer["id"])
    assert answer["output"][0]["content"][0]["text"] in prompt_of(storing)


async def test_items_become_messages(world, client) -> None:
    items = [
        {"role": "developer", "content": "in all"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "b", "annotations": []}, {"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "c"},
    ]  # fmt: skip
    await ask(client, input=items, instructions="be brief")
    assert prompt_of(world) == (
        "<|im_start|>system\nbe brief\n\nin all<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb\nno<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_what_is_not_known_is_left_out_and_named(client) -> None:
    items = [{"role": "user", "content": "a"}, {"type": "web_search_call", "id": "ws_1", "status": "completed"}]
    tools = [{"type": "web_search"}, {"type": "custom", "name": "apply_patch"}]
    response = await client.post(PATH, json=BODY | {"input": items, "tools": tools, "unheard": 1})
    assert response.status_code == 200, response.text
    ignored = response.headers["x-ignored-fields"]
    for name in ("input[1]", "web_search_call", "tools[0]", "tools[1]", "custom", "unheard"):
        assert name in ignored
    error = await refuse(client, tools=tools, strict=True)
    assert "tools[0]" in error["message"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0].name"),
        ({"input": 5}, "input"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 100_000}, "100000"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"previous_response_id": "resp_1"}, "max_stored_responses"),
        ({"temperature": 3}, "temperature"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_its_name(world, client, fields, named) -> None:
    error = await refuse(client, **fields)
    assert named in error["message"]
    assert world.metrics.outcomes == ["invalid"]


async def test_an_error_in_a_stream_is_its_end(world, client) -> None:
    world.engine.fail_after = 3
    failed, events = await stream(client)
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "engine_request"
    assert failed["output"][0]["status"] == "incomplete"
    assert [event["type"] for event in events][-1] == "response.failed"
    assert world.metrics.outcomes == ["error"]


async def test_a_response_is_kept_asked_for_followed_and_deleted(storing, client) -> None:
    storing.engine.say("hi there")
    first = await ask(client, instructions="be brief")
    assert first["store"]
    assert (await client.get(f"{PATH}/{first['id']}")).json() == first
    items = (await client.get(f"{PATH}/{first['id']}/input_items")).json()
    assert items["data"][0]["content"] == [{"type": "input_text", "text": "hello"}]
    second, _ = await stream(client, previous_response_id=first["id"], input="and?")
    assert second["previous_response_id"] == first["id"]
    assert prompt_of(storing) == (  # instructions are not handed on
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi there<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (await client.get(f"{PATH}/{second['id']}")).json() == second
    assert (await client.delete(f"{PATH}/{first['id']}")).json()["deleted"]
    assert (await client.get(f"{PATH}/{first['id']}")).status_code == 404
    assert (await client.delete(f"{PATH}/{first['id']}")).status_code == 404
    third = await ask(client, previous_response_id=second["id"])  # has the whole conversation
    assert third["usage"]["input_tokens"] > second["usage"]["input_tokens"]
    assert "previous_response" in (await refuse(client, 404, previous_response_id=first["id"]))["code"]


async def test_nothing_is_kept_that_nobody_wants_kept(storing, client) -> None:
    answer = await ask(client, store=False)
    assert not answer["store"]
    assert (await client.get(f"{PATH}/{answer['id']}")).status_code == 404
    storing.engine.fail_after = 2
    failed, _ = await stream(client)
    assert (await client.get(f"{PATH}/{failed['id']}")).status_code == 404
    assert len(storing.state.answers) == 0


async def test_a_response_that_has_ended_is_not_cancelled(storing, client) -> None:
    answer = await ask(client)
    assert (await client.post(f"{PATH}/{answer['id']}/cancel")).status_code == 400
    assert (await client.post(f"{PATH}/resp_nothing/cancel")).status_code == 404


async def test_cancelling_ends_the_stream_with_one_event(world) -> None:
    world.engine.delay = 0.05
    world.engine.script = lambda request: [5] * 200
    with world.serve() as url:
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            body = BODY | {"stream": True, "max_output_tokens": 200}
            text, cancelled = "", None
            async with client.stream("POST", PATH, json=body, headers={"X-Request-Id": "mine"}) as response:
                async for piece in response.aiter_text():
                    text += piece
                    if "output_text.delta" in text and cancelled is None:
                        cancelled = await client.post(f"{PATH}/resp_mine/cancel")
            assert cancelled.json()["status"] == "cancelled"
            assert read_response(text)[0]["error"]["code"] == "request_aborted"
    assert world.metrics.outcomes == ["abort"]


def test_the_store_is_bounded_in_number_and_in_bytes() -> None:
    store = AnswerStore(max_answers=3, max_bytes=10_000)
    small = StoredAnswer(b"x" * 100, b"", b"")
    for number in range(5):
        assert store.keep("me", str(number), small)
    assert [store.find("me", str(number)) is not None for number in range(5)] == [False, False, True, True, True]
    assert store.find("you", "4") is None
    assert not store.delete("you", "4")
    assert not store.keep("me", "large", StoredAnswer(b"x" * 20_000, b"", b""))
    assert len(store) == 3
    store.keep("you", "4", StoredAnswer(b"x" * 9_000, b"", b""))
    assert (len(store), store.find("me", "4")) == (1, None)
    store.keep("you", "4", small)
    assert store.num_bytes == small.num_bytes
    store.delete("you", "4")
    assert store.num_bytes == 0


def test_other_keys_know_nothing_of_a_response(operate) -> None:
    config = {"server": {"api_keys": ["one", "two"]}, "limits": {"max_stored_responses": 10}}
    with operate(config) as operation, httpx.Client(base_url=operation.url, timeout=20) as client:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        answer = client.post(PATH, json=BODY | {"model": "tiny"}, headers=one).json()
        path = f"{PATH}/{answer['id']}"
        assert client.get(path).status_code == 401
        assert [client.get(path, headers=key).status_code for key in (one, two)] == [200, 404]
        body = BODY | {"model": "tiny", "previous_response_id": answer["id"]}
        assert client.post(PATH, json=body, headers=two).status_code == 404
        assert client.delete(path, headers=two).status_code == 404
        assert client.post(PATH, json=body, headers=one).status_code == 200


async def test_deep_and_large_bodies_are_refused(world) -> None:
    async with connect(world) as client:
        deep = '{"model":"tiny","input":"x","tools":[{"type":"function","name":"f","parameters":' + "[" * 5000
        response = await client.post(PATH, content=deep, headers={"content-type": "application/json"})
        assert response.status_code == 400
        items = [{"role": "user", "content": "x"}] * 5000
        assert (await client.post(PATH, json=BODY | {"input": items})).status_code == 400
        response = await client.post(PATH, content=json.dumps(BODY)[:-5], headers={"content-type": "application/json"})
        assert response.status_code == 400
