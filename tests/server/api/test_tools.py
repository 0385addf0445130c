"""Tool calls of chats, with OpenAI's own client over real HTTP: whole and streamed, and what a hostile client sends."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from tests.support.chat_templates import TEMPLATES
from tests.support.fake_engine import CHAT_TEMPLATE
from tests.support.server_world import World, connect, events
from tests.support.tool_world import NOW, WEATHER, openai_client, prompt_of, tool_world

PATH = "/v1/chat/completions"
ASK = [{"role": "user", "content": "How is Paris?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
ARGUMENTS = '{"city": "Paris", "days": 3}'
SPECIAL_CALL = '[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 3}'


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with tool_world(TEMPLATES["qwen"]) as world:
        yield world


@pytest.fixture(scope="module")
def sdk(world: World) -> Iterator[openai.OpenAI]:
    with openai_client(world) as client:
        yield client


def fields(**more: object) -> dict:
    return {"model": "tiny", "messages": ASK, "tools": [WEATHER, NOW], "max_tokens": 400} | more


def joined(stream: Iterator) -> tuple[str, list[dict], str | None, list]:
    """A stream's content, its calls with their arguments joined, and its finish reason; and its chunks."""
    content, calls, finish, chunks = "", [], None, list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    assert call.index == len(calls)
                    assert call.type == "function"
                    calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                calls[call.index]["arguments"] += call.function.arguments or ""
    return content, calls, finish, chunks


def test_a_call_is_answered_whole(world: World, sdk: openai.OpenAI) -> None:
    world.engine.say(f"Let me see.\n{CALL}")
    choice = sdk.chat.completions.create(**fields()).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", ARGUMENTS)
    assert call.id.startswith("call_")


@pytest.mark.parametrize("step_size", [1, 3, 1000])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_what_the_whole_answer_says(world: World, sdk: openai.OpenAI, step_size: int, n: int) -> None:
    world.engine.say(f"Well. {CALL}\n" + CALL.replace("Paris", "Rome 🙂"))
    world.engine.step_size = step_size
    whole = sdk.chat.completions.create(**fields(n=n))
    options = {"include_usage": True}
    stream = sdk.chat.completions.create(**fields(n=n), stream=True, stream_options=options)
    chunks = list(stream)
    for index in range(n):
        own = []
        for chunk in chunks:
            mine = [choice for choice in chunk.choices if choice.index == index]
            own += [chunk.model_copy(update={"choices": mine})] if mine else []
        content, calls, finish, _ = joined(iter(own))
        message = whole.choices[index].message
        assert (content, finish) == (message.content, "tool_calls")
        assert [(c["name"], c["arguments"]) for c in calls] == [
            (c.function.name, c.function.arguments) for c in message.tool_calls
        ]
        assert len({c["id"] for c in calls}) == 2
    assert chunks[-1].usage == whole.usage
    world.engine.step_size = 1


def test_only_a_call_has_no_content(world: World, sdk: openai.OpenAI) -> None:
    world.engine.say(CALL)
    message = sdk.chat.completions.create(**fields()).choices[0].message
    assert message.content is None
    assert len(message.tool_calls) == 1
    content, calls, finish, chunks = joined(sdk.chat.completions.create(**fields(), stream=True))
    assert (content, len(calls), finish) == ("", 1, "tool_calls")
    assert chunks[0].choices[0].delta.role == "assistant"
    first = next(c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or [])
    assert (first.function.name, first.function.arguments) == ("weather", "")
    assert chunks[-1].choices[0].delta.tool_calls is None


def test_an_answer_without_a_call_is_what_it_was(world: World, sdk: openai.OpenAI) -> None:
    world.engine.say("It is sunny, and 2 < 3.")
    choice = sdk.chat.completions.create(**fields()).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("It is sunny, and 2 < 3.", "stop")
    assert choice.message.tool_calls is None
    content, calls, finish, _ = joined(sdk.chat.completions.create(**fields(), stream=True))
    assert (content, calls, finish) == ("It is sunny, and 2 < 3.", [], "stop")


def test_a_malformed_call_is_content(world: World, sdk: openai.OpenAI) -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": }}\n</tool_call>'
    world.engine.say(text)
    choice = sdk.chat.completions.create(**fields()).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")


def test_a_call_that_the_length_cuts_keeps_its_arguments(world: World, sdk: openai.OpenAI) -> None:
    world.engine.say(CALL)
    num = len(world.tokenizer.encode(CALL[:-35], add_special_tokens=False))
    whole = sdk.chat.completions.create(**fields(max_tokens=num)).choices[0]
    content, calls, finish, _ = joined(sdk.chat.completions.create(**fields(max_tokens=num), stream=True))
    assert finish == whole.finish_reason == "length"
    assert content == ""
    assert calls[0]["arguments"] == whole.message.tool_calls[0].function.arguments
    assert ARGUMENTS.startswith(calls[0]["arguments"])
    assert calls[0]["arguments"]


def test_logprobs_are_those_of_all_tokens(world: World, sdk: openai.OpenAI) -> None:
    world.engine.say(f"Ok. {CALL}")
    whole = sdk.chat.completions.create(**fields(logprobs=True, top_logprobs=1))
    stream = sdk.chat.completions.create(**fields(logprobs=True, top_logprobs=1), stream=True)
    told = [item for c in stream for ch in c.choices if ch.logprobs for item in ch.logprobs.content]
    assert told == whole.choices[0].logprobs.content
    assert len(told) == whole.usage.completion_tokens


def test_special_tokens_that_no_text_shows_reach_the_parser() -> None:
    with tool_world(TEMPLATES["mistral args"], special=("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")) as world:
        world.engine.say(f"[THINK]hm[/THINK]I look.{SPECIAL_CALL}{SPECIAL_CALL}")
        with openai_client(world) as sdk:
            for skip in (None, False):
                extra = {} if skip is None else {"extra_body": {"skip_special_tokens": skip}}
                message = sdk.chat.completions.create(**fields(), **extra).choices[0].message
                assert (message.content, message.reasoning_content) == ("I look.", "hm")
                assert [c.function.arguments for c in message.tool_calls] == [ARGUMENTS] * 2
                content, calls, _, _ = joined(sdk.chat.completions.create(**fields(), **extra, stream=True))
                assert (content, [c["arguments"] for c in calls]) == ("I look.", [ARGUMENTS] * 2)
            world.engine.say("It begins with [TOOL_CALLS].")
            assert sdk.chat.completions.create(**fields()).choices[0].message.content == "It begins with ."


def test_a_stop_string_ends_a_call_as_it_ends_text(world: World, sdk: openai.OpenAI) -> None:
    world.engine.say(f"{CALL} and then")
    choice = sdk.chat.completions.create(**fields(stop=["</tool_call>"])).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.arguments == ARGUMENTS


def test_a_conversation_with_calls_goes_through_the_template(world: World, sdk: openai.OpenAI) -> None:
    world.engine.say("Sunny.")
    calls = [
        {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}},
        {"id": "a2", "type": "function", "function": {"name": "now", "arguments": ""}},
    ]
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "a2", "content": [{"type": "text", "text": "noon"}]},
    ]
    sdk.chat.completions.create(**fields(messages=messages))
    prompt = prompt_of(world)
    assert f"<|im_start|>assistant\n{CALL}\n<tool_call>\n" in prompt
    assert '{"name": "now", "arguments": {}}' in prompt
    assert "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response>" in prompt
    assert '"name": "weather"' in prompt.partition("How is Paris")[0]
    assert "None" not in prompt


def test_tool_choice_none_shows_no_tools_and_finds_no_calls(world: World, sdk: openai.OpenAI) -> None:
    world.engine.say(CALL)
    choice = sdk.chat.completions.create(**fields(tool_choice="none")).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (CALL, None)
    assert "weather" not in prompt_of(world)


CHOICES = {
    "auto": ("auto", {"weather", "now"}, False),
    "required": ("required", {"weather", "now"}, True),
    "named": ({"type": "function", "function": {"name": "now"}}, {"now"}, True),
    "allowed": (
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]},
        },
        {"weather"},
        True,
    ),
}


@pytest.mark.parametrize("kind", CHOICES)
def test_the_choice_of_tools_is_in_the_grammar(world: World, sdk: openai.OpenAI, kind: str) -> None:
    choice, names, must_call = CHOICES[kind]
    world.engine.say(CALL)
    sdk.chat.completions.create(**fields(tool_choice=choice))
    grammar = world.engine.requests[-1].params.grammar
    lark = json.loads(grammar.text)[0]["lark_grammar"]
    assert {name for name in ("weather", "now") if f'"{name}\\"' in lark} == names
    assert ("text: " in lark) != must_call
    assert '"name": "now"' in prompt_of(world)


def test_without_parallel_calls_the_grammar_has_one(world: World, sdk: openai.OpenAI) -> None:
    def lark(**more: object) -> str:
        sdk.chat.completions.create(**fields(tool_choice="required", **more))
        return json.loads(world.engine.requests[-1].params.grammar.text)[0]["lark_grammar"]

    assert ")*" in lark()
    assert ")*" not in lark(parallel_tool_calls=False)


def test_a_model_whose_template_knows_no_tools_is_told_of_them() -> None:
    with tool_world(CHAT_TEMPLATE) as world, openai_client(world) as sdk:
        world.engine.say(CALL)
        call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
        messages = [
            {"role": "system", "content": "Be brief."},
            *ASK,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "noon"},
            {"role": "user", "content": "And Paris?"},
        ]
        choice = sdk.chat.completions.create(**fields(messages=messages)).choices[0]
        assert choice.message.tool_calls[0].function.name == "weather"
        prompt = prompt_of(world)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")
    assert '"description": "Tells the weather of a city."' in prompt
    assert '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>' in prompt
    assert "<|im_start|>user\n<tool_response>\nnoon\n</tool_response>\n\nAnd Paris?<|im_end|>" in prompt


@pytest.mark.parametrize("shape", sorted(TEMPLATES))
def test_every_shape_of_template_takes_a_conversation_with_calls(shape: str) -> None:
    """Whatever it knows of tools: names, arguments and results are in the prompt, and nothing of Python's."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    messages = [
        *ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    with tool_world(TEMPLATES[shape]) as world, openai_client(world) as sdk:
        world.engine.say("Sunny.")
        message = sdk.chat.completions.create(**fields(messages=messages)).choices[0].message
        assert (message.content or message.reasoning) == "Sunny."
        prompt = prompt_of(world)
    assert all(word in prompt for word in ("weather", "city", "Paris", "sunny"))
    assert "None" not in prompt
    assert "'city'" not in prompt


REFUSED = {
    "a bad name": ({"tools": [{"type": "function", "function": {"name": "no name!"}}]}, "tools[0].function.name", ""),
    "no name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "required"),
    "a long name": (
        {"tools": [{"type": "function", "function": {"name": "x" * 129}}]}, "tools[0].function.name", "128",
    ),
    "two of a name": ({"tools": [NOW, WEATHER, NOW]}, "tools[2].function.name", "tools[0]"),
    "another type": ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
    "no object": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        "tools[0].function.parameters.type",
        "object",
    ),
    "an unknown choice": (
        {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "then"}}},
        "tool_choice",
        "'then'",
    ),
    "a choice of nothing": ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    "a wrong choice": ({"tools": [NOW], "tool_choice": "maybe"}, "tool_choice", ""),
    "a call without a name": (
        {"messages": [*ASK, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"arguments": "{}"}}]}]},
        "messages[1].tool_calls[0].function.name",
        "required",
    ),
    "a strict schema that cannot be followed": (
        {
            "tools": [NOW, {"type": "function", "function": {"name": "f", "strict": True, "parameters": {
                "type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}, "required": ["a"]}}}]
        },
        "tools[1].function.parameters",
        "",
    ),
    "a budget of less than nothing": ({"reasoning_max_tokens": -1}, "reasoning_max_tokens", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
async def test_what_cannot_be_honoured_is_a_400_that_names_it(world: World, kind: str) -> None:
    wrong, param, word = REFUSED[kind]
    async with connect(world) as client:
        response = await client.post(PATH, json={"model": "tiny", "messages": ASK} | wrong)
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert error["param"].startswith(param)
    assert word in error["message"]


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


HOSTILE = {
    "many tools": ([{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)], "129"),
    "large tools": ([{"type": "function", "function": {"name": "f", "description": "x" * 300_000}}], "262144"),
    "a deep schema": ([{"type": "function", "function": {"name": "f", "parameters": nested(60)}}], "64 levels"),
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_client_is_told_the_limit(world: World, kind: str) -> None:
    tools, word = HOSTILE[kind]
    async with connect(world) as client:
        response = await client.post(PATH, json={"model": "tiny", "messages": ASK, "tools": tools})
    assert response.status_code == 400, response.text[:300]
    assert word in response.json()["error"]["message"]


async def test_a_schema_that_is_too_deep_to_be_read_is_a_400(world: World) -> None:
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    tool = '{"type": "function", "function": {"name": "f", "parameters": ' + deep + "}}"
    body = json.dumps({"model": "tiny", "messages": ASK})[:-1] + f', "tools": [{tool}]}}'
    async with connect(world) as client:
        response = await client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text[:300]


def test_tools_that_the_grammar_cannot_hold_to_are_still_served(world: World, sdk: openai.OpenAI) -> None:
    """Nothing demands that their schema be followed."""
    odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}, "required": ["a"]}
    world.engine.say('<tool_call>{"name": "odd", "arguments": {"a": "b"}}</tool_call>')
    tools = [{"type": "function", "function": {"name": "odd", "parameters": odd}}]
    choice = sdk.chat.completions.create(**fields(tools=tools)).choices[0]
    assert choice.message.tool_calls[0].function.arguments == '{"a": "b"}'


async def test_tokenize_counts_what_a_chat_with_tools_would_have(world: World) -> None:
    async with connect(world) as client:
        answer = await client.post("/tokenize", json={"messages": ASK, "tools": [WEATHER]})
        chat = await client.post(PATH, json=fields(tools=[WEATHER], max_tokens=2))
    assert answer.json()["tokens"] == world.engine.requests[-1].prompt_token_ids
    assert chat.status_code == 200


async def test_an_empty_list_of_tools_is_none(world: World) -> None:
    async with connect(world) as client:
        response = await client.post(PATH, json=fields(tools=[], tool_choice="auto", stream=True))
    assert response.status_code == 200
    assert events(response.text)
