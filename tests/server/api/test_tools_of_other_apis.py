"""Tools and reasoning in the words of Responses, Messages and Ollama: whole and streamed, there and back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from tests.support.chat_templates import TEMPLATES
from tests.support.event_grammar import read_message, read_response
from tests.support.server_world import World, connect
from tests.support.tool_world import prompt_of, tool_world

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
THOUGHT = "<think>\nWhere is it?\n</think>\n\n"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
OTHER_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ASKED = "And in Rome?"
RESPONSE = {
    "model": "tiny",
    "input": ASKED,
    "tools": [{"type": "function", "name": "weather", "description": "tells it", "parameters": SCHEMA}],
}
MESSAGE = {
    "model": "tiny",
    "max_tokens": 500,
    "messages": [{"role": "user", "content": ASKED}],
    "tools": [{"name": "weather", "description": "tells it", "input_schema": SCHEMA}],
}
OLLAMA = {
    "model": "tiny",
    "messages": [{"role": "user", "content": ASKED}],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}],
}


@pytest.fixture(scope="module")
def qwen() -> Iterator[World]:
    with tool_world(TEMPLATES["qwen"]) as world:
        yield world


@pytest.fixture
async def client(qwen: World) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(qwen) as client:
        yield client


async def respond(client: httpx.AsyncClient, *, streams: bool, **fields) -> dict:
    response = await client.post("/v1/responses", json=RESPONSE | fields | {"stream": streams})
    assert response.status_code == 200, response.text
    return read_response(response.text)[0] if streams else response.json()


async def message(client: httpx.AsyncClient, *, streams: bool, **fields) -> dict:
    response = await client.post("/v1/messages", json=MESSAGE | fields | {"stream": streams})
    assert response.status_code == 200, response.text
    return read_message(response.text)[0] if streams else response.json()


both = pytest.mark.parametrize("streams", [False, True])


@both
async def test_a_response_has_an_item_for_each_thought_text_and_call(qwen, client, streams) -> None:
    qwen.engine.say(f"{THOUGHT}I look.\n{CALL}\n{OTHER_CALL}")
    answer = await respond(client, streams=streams)
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message", "function_call", "function_call"]
    thought, text, *calls = answer["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Where is it?"}]
    assert text["content"][0]["text"].strip() == "I look."
    assert [json.loads(call["arguments"]) for call in calls] == [{"city": "Rome"}, {"city": "Paris"}]
    assert len({call["call_id"] for call in calls}) == len({item["id"] for item in answer["output"]}) / 2 == 2
    assert answer["status"] == "completed"
    assert 0 < answer["usage"]["output_tokens_details"]["reasoning_tokens"] < answer["usage"]["output_tokens"]


@both
async def test_a_message_has_a_block_for_each_thought_text_and_call(qwen, client, streams) -> None:
    qwen.engine.say(f"{THOUGHT}I look.\n{CALL}\n{OTHER_CALL}")
    answer = await message(client, streams=streams)
    thought, text, *calls = answer["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "Where is it?")
    assert thought["signature"]
    assert text["text"].strip() == "I look."
    assert [(call["type"], call["name"], call["input"]) for call in calls] == [
        ("tool_use", "weather", {"city": "Rome"}),
        ("tool_use", "weather", {"city": "Paris"}),
    ]
    assert answer["stop_reason"] == "tool_use"


@both
async def test_a_call_that_is_cut_off_is_told_as_far_as_it_came(qwen, client, streams) -> None:
    qwen.engine.say(f"I look.\n{CALL}")
    num_tokens = len(qwen.tokenizer.encode(f"I look.\n{CALL[:58]}", add_special_tokens=False))
    response = await respond(client, streams=streams, max_output_tokens=num_tokens)
    assert response["status"] == "incomplete"
    cut = await message(client, streams=streams, max_tokens=num_tokens)
    assert cut["stop_reason"] == "max_tokens"


async def test_ollama_tells_calls_as_objects(qwen, client) -> None:
    qwen.engine.say(f"{THOUGHT}{CALL}")
    streamed = await client.post("/api/chat", json=OLLAMA)
    lines = [json.loads(line)["message"] for line in streamed.text.splitlines()]
    assert "".join(line.get("thinking", "") for line in lines) == "Where is it?"
    [calls] = [line["tool_calls"] for line in lines if "tool_calls" in line]
    assert calls[0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    whole = (await client.post("/api/chat", json=OLLAMA | {"stream": False})).json()["message"]
    assert (whole["thinking"], whole["content"]) == ("Where is it?", "")
    assert whole["tool_calls"][0]["function"] == calls[0]["function"]


async def test_a_conversation_with_calls_is_the_same_prompt_in_every_api(qwen, client) -> None:
    qwen.engine.say("Sunny.")
    items = [
        {"role": "user", "content": ASKED},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"Rome"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city":"Paris"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
    ]
    tools = [RESPONSE["tools"][0] | {"description": "tells it"}, {"type": "web_search"}]
    await respond(client, streams=False, input=items, instructions="Be brief.", tools=tools)
    prompt = prompt_of(qwen)
    uses = [
        {"type": "tool_use", "id": f"c{number}", "name": "weather", "input": {"city": city}}
        for number, city in enumerate(("Rome", "Paris"), start=1)
    ]
    said = [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "I look."}, *uses]
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": "sun"},
        {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "rain"}]},
    ]
    turns = [*MESSAGE["messages"], {"role": "assistant", "content": said}, {"role": "user", "content": results}]
    await message(client, streams=False, messages=turns, system="Be brief.")
    assert prompt_of(qwen) == prompt
    calls = [{"function": {"name": "weather", "arguments": {"city": city}}} for city in ("Rome", "Paris")]
    messages = [
        {"role": "system", "content": "Be brief."},
        *OLLAMA["messages"],
        {"role": "assistant", "content": "I look.", "thinking": "hm", "tool_calls": calls},
        {"role": "tool", "content": "sun", "tool_name": "weather"},
        {"role": "tool", "content": "rain", "tool_name": "weather"},
    ]
    tool = {"type": "function", "function": OLLAMA["tools"][0]["function"] | {"description": "tells it"}}
    assert (await client.post("/api/chat", json=OLLAMA | {"messages": messages, "tools": [tool]})).status_code == 200
    assert prompt_of(qwen) == prompt


@pytest.mark.parametrize(
    ("choice", "other"),
    [
        ("required", {"type": "any"}),
        ({"type": "function", "name": "weather"}, {"type": "tool", "name": "weather"}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
         {"type": "any", "disable_parallel_tool_use": True}),
    ],
)  # fmt: skip
async def test_a_call_that_is_asked_for_is_held_to_a_grammar(qwen, client, choice, other) -> None:
    qwen.engine.say(CALL)
    await respond(client, streams=False, tool_choice=choice)
    assert qwen.engine.requests[-1].params.grammar is not None
    await message(client, streams=False, tool_choice=other)
    assert qwen.engine.requests[-1].params.grammar is not None
    await message(client, streams=False, tool_choice={"type": "none"})
    assert qwen.engine.requests[-1].params.grammar is None


async def test_a_schema_is_held_to_a_grammar(qwen, client) -> None:
    qwen.engine.say('{"city": "Rome"}')
    text = {"format": {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}}
    answer = await respond(client, streams=False, tools=[], text=text)
    assert answer["text"]["format"]["schema"] == SCHEMA
    assert qwen.engine.requests[-1].params.grammar is not None
    wanted = {"format": {"type": "json_schema", "schema": SCHEMA}}
    await message(client, streams=False, tools=[], output_config=wanted)
    assert qwen.engine.requests[-1].params.grammar is not None
    response = await client.post("/api/chat", json=OLLAMA | {"tools": [], "format": SCHEMA})
    assert response.status_code == 200
    assert qwen.engine.requests[-1].params.grammar is not None


async def test_tools_that_make_no_sense_are_refused(client) -> None:
    wrong = RESPONSE["tools"][0] | {"parameters": {"type": "nonsense"}, "strict": True}
    response = await client.post("/v1/responses", json=RESPONSE | {"tools": [wrong]})
    assert response.status_code == 400
    response = await client.post("/v1/responses", json=RESPONSE | {"tools": [{"type": "function", "name": "a b"}]})
    assert response.status_code == 400
    assert "name" in response.json()["error"]["message"]
    choice = {"type": "tool", "name": "nothing"}
    assert (await client.post("/v1/messages", json=MESSAGE | {"tool_choice": choice})).status_code == 400


async def test_tokens_of_tools_are_counted(qwen, client) -> None:
    qwen.engine.say("x")
    body = {name: value for name, value in MESSAGE.items() if name != "max_tokens"}
    counted = (await client.post("/v1/messages/count_tokens", json=body)).json()["input_tokens"]
    answer = await message(client, streams=False)
    assert counted == answer["usage"]["input_tokens"]
