"""/v1/messages: what becomes of blocks, what the answers say, and which events tell it."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.support.event_grammar import read_message

PATH = "/v1/messages"
TURN = {"role": "user", "content": "hello"}
BODY = {"model": "tiny", "max_tokens": 20, "messages": [TURN], "seed": 1}


async def ask(client, **fields) -> dict:
    response = await client.post(PATH, json=BODY | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client, **fields) -> tuple[dict, list[dict]]:
    response = await client.post(PATH, json=BODY | fields | {"stream": True})
    assert response.status_code == 200, response.text
    return read_message(response.text)


def prompt_of(world) -> str:
    return world.tokenizer.decode(world.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def test_an_answer_has_everything_that_anthropic_says_it_has(world, client) -> None:
    world.engine.say("hi there")
    world.engine.num_cached_tokens = 2
    answer = await ask(client)
    assert answer.pop("id").startswith("msg_")
    num_prompt = len(world.engine.requests[0].prompt_token_ids)
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "hi there"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": num_prompt - 2,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "output_tokens": len(world.tokenizer.encode("hi there", add_special_tokens=False)) + 1,
        },
    }
    assert world.metrics.outcomes == ["stop"]


async def test_a_stream_says_what_the_answer_says(world, client) -> None:
    world.engine.say("naïve café 你好 🙂")
    whole = await ask(client)
    streamed, events = await stream(client)
    assert streamed | {"id": whole["id"]} == whole
    assert sum(event["type"] == "content_block_delta" for event in events) > 3


@pytest.mark.parametrize("streams", [False, True])
async def test_reasons_to_stop(world, client, streams) -> None:
    async def reason(**fields) -> tuple[str, str | None]:
        answer = (await stream(client, **fields))[0] if streams else await ask(client, **fields)
        return answer["stop_reason"], answer["stop_sequence"]

    world.engine.say("one two three")
    assert await reason() == ("end_turn", None)
    assert await reason(max_tokens=2) == ("max_tokens", None)
    assert await reason(stop_sequences=["zzz", " two"]) == ("stop_sequence", " two")
    world.engine.say("")
    assert await reason() == ("end_turn", None)


async def test_a_limit_beyond_the_context_is_what_the_context_leaves(world, client) -> None:
    """The field is required, and clients send what large models take."""
    await ask(client, max_tokens=32_000)
    [request] = world.engine.requests
    assert request.params.max_tokens == 256 - len(request.prompt_token_ids)


async def test_blocks_become_messages(world, client) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "x"},
                                          {"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "document", "source": {"type": "text", "data": "c"}},
                                     {"type": "text", "text": "d"}]},
    ]  # fmt: skip
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=abc12;"},
        {"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}},
    ]
    await ask(client, messages=turns, system=system)
    expected = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc\n\nd<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_of(world) == expected
    await ask(client, messages=turns, system="x-anthropic-billing-header: cch=other\n\nbe brief")
    assert prompt_of(world) == expected


async def test_an_answer_that_was_begun_is_continued(world, client) -> None:
    world.engine.say(" world")
    answer = await ask(client, messages=[TURN, {"role": "assistant", "content": "hello"}])
    assert prompt_of(world) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello"
    assert answer["content"][0]["text"] == " world"


async def test_tokens_are_counted_as_a_message_has_them(world, client) -> None:
    body = {name: value for name, value in BODY.items() if name != "max_tokens"}
    counted = await client.post(f"{PATH}/count_tokens", json=body | {"system": "be brief"})
    assert counted.status_code == 200, counted.text
    answer = await ask(client, system="be brief")
    assert counted.json() == {"input_tokens": answer["usage"]["input_tokens"]}


async def test_what_is_not_known_is_left_out_and_named(client) -> None:
    turns = [TURN, {"role": "assistant", "content": [{"type": "server_tool_use", "id": "1", "name": "x", "input": {}}]}]
    tools = [{"type": "web_search_20250305", "name": "web_search"}]
    response = await client.post(PATH, json=BODY | {"messages": [*turns, TURN], "tools": tools, "unheard": 1})
    assert response.status_code == 200, response.text
    for name in ("messages[1].content[0]", "server_tool_use", "tools[0]", "unheard"):
        assert name in response.headers["x-ignored-fields"]


@pytest.mark.parametrize("block", [{"type": "unheard"}, {"type": "thinking", "thinking": "a"}])
async def test_a_turn_of_blocks_that_are_left_out_is_a_turn(client, block) -> None:
    turns = [{"role": "user", "content": [block]}]
    for path in (PATH, f"{PATH}/count_tokens"):
        for messages in (turns, [TURN, {"role": "assistant", "content": "I"}, *turns]):
            response = await client.post(path, json=BODY | {"messages": messages})
            assert response.status_code == 200, response.text
            assert f"messages[{len(messages) - 1}].content[0]" in response.headers["x-ignored-fields"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"system": [{"type": "image", "source": {}}]}, "system[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "x"}]}, TURN]}, "id"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
        ({"system": 5}, "system"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"thinking": {"type": "sometimes"}}, "thinking"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(operate, fields, named) -> None:
    with operate({}) as operation, httpx.Client(base_url=operation.url, timeout=20) as client:
        response = client.post(PATH, json=BODY | fields, headers={"X-Request-Id": "mine"})
    assert response.status_code == 400, response.text
    body = response.json()
    assert (body["type"], body["error"]["type"], body["request_id"]) == ("error", "invalid_request_error", "mine")
    assert named in body["error"]["message"]


def test_every_error_is_in_the_envelope(operate) -> None:
    config = {"server": {"api_keys": ["key"]}, "limits": {"max_body_bytes": 2000}}
    with operate(config) as operation, httpx.Client(base_url=operation.url, timeout=20) as client:
        key = {"x-api-key": "key", "anthropic-version": "2023-06-01"}

        def error(status: int, path: str = PATH, method: str = "POST", **options) -> str:
            response = client.request(method, path, **{"json": BODY, "headers": key} | options)
            assert response.status_code == status, response.text
            assert set(response.json()) == {"type", "error", "request_id"}
            assert int(response.headers["content-length"]) == len(response.content)
            return response.json()["error"]["type"]

        assert error(401, headers={}) == "authentication_error"
        assert error(401, headers={"x-api-key": "other"}) == "authentication_error"
        assert error(401, headers=key | {"Authorization": "Bearer other"}) == "authentication_error"
        assert error(404, json=BODY | {"model": "other"}) == "not_found_error"
        assert error(404, path=f"{PATH}/nothing") == "not_found_error"
        assert error(405, method="GET") == "invalid_request_error"
        assert error(413, json=BODY | {"system": "x" * 3000}) == "request_too_large"
        assert error(400, path="/v1//messages/", json=[]) == "invalid_request_error"
        assert client.post(PATH, json=BODY, headers=key).status_code == 200
        assert client.post(PATH, json=BODY, headers=key | {"Authorization": "Bearer key"}).status_code == 200
        assert "error" in client.post("/v1/completions", json={}, headers={}).json()
        operation.engine.fail("internal", "gone")
        assert error(503) == "overloaded_error"


async def test_an_error_in_a_stream_is_its_end(world, client) -> None:
    world.engine.fail_after = 3
    message, events = await stream(client)
    assert message["error"]["type"] == "api_error"
    assert events[-1]["type"] == "error"
    assert world.metrics.outcomes == ["error"]


async def test_a_client_that_leaves_aborts_its_message(world) -> None:
    world.engine.delay = 0.02
    world.engine.script = lambda request: [5] * 200
    with world.serve() as url:
        async with (
            httpx.AsyncClient(base_url=url, timeout=20) as client,
            client.stream("POST", PATH, json=BODY | {"stream": True, "max_tokens": 200}) as response,
        ):
            async for text in response.aiter_text():
                if "content_block_delta" in text:
                    break
        for _ in range(500):
            if world.engine.aborted:
                break
            await asyncio.sleep(0.01)
    assert world.metrics.outcomes == ["abort"]
    assert not world.engine.running
