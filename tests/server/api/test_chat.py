"""POST /v1/chat/completions: what becomes of messages, and what the answers say."""

from __future__ import annotations

import pytest

from tests.support.server_world import connect, events, make_world

PATH = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "seed": 1, "max_tokens": 20}


async def ask(client, **fields) -> dict:
    response = await client.post(PATH, json=BODY | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client, **fields) -> list[dict]:
    response = await client.post(PATH, json=BODY | fields | {"stream": True})
    assert response.status_code == 200, response.text
    return events(response.text)


def prompt_of(world) -> str:
    return world.tokenizer.decode(world.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def test_an_answer_has_everything_that_openai_says_it_has(world, client) -> None:
    world.engine.say("hi there")
    answer = await ask(client)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["system_fingerprint"] == "fp_test"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hi there", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["prompt_tokens"] == len(world.engine.requests[0].prompt_token_ids)


async def test_messages_become_the_prompt_of_the_template(world, client) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    await ask(client, messages=messages)
    assert prompt_of(world) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


async def test_a_developer_speaks_as_the_system_where_the_template_knows_no_developer(world, client) -> None:
    await ask(client, messages=[{"role": "developer", "content": "x"}])
    assert prompt_of(world).startswith("<|im_start|>system\nx")


async def test_the_template_gets_the_clients_variables(world, client) -> None:
    await ask(client, chat_template_kwargs={"shout": True}, add_generation_prompt=False)
    assert prompt_of(world) == "<|im_start|>user\nhello<|im_end|>\nSHOUT"


async def test_the_last_message_can_be_continued_and_echoed(world, client) -> None:
    world.engine.say(" world")
    messages = [*BODY["messages"], {"role": "assistant", "content": "hello"}]
    fields = {"messages": messages, "continue_final_message": True, "echo": True}
    answer = await ask(client, **fields)
    assert prompt_of(world) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello"
    assert answer["choices"][0]["message"]["content"] == "hello world"
    chunks = await stream(client, **fields)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "hello world"


async def test_a_model_without_a_template_says_so() -> None:
    async with connect(make_world(None)) as client:
        response = await client.post(PATH, json=BODY)
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7]['content'] }}", "no element 7"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
        ("{{ 1 / 0 }}", "zero"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
    ],
)
async def test_what_the_template_refuses_is_a_400_that_says_why(template: str, reason: str) -> None:
    async with connect(make_world(template)) as client:
        response = await client.post(PATH, json=BODY)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


async def test_an_image_is_refused_by_name(client) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    response = await client.post(PATH, json=BODY | {"messages": [{"role": "user", "content": [part]}]})
    error = response.json()["error"]
    assert response.status_code == 400
    assert "image_url" in error["message"]
    assert error["param"] == "messages[0].content[0].type"


@pytest.mark.parametrize(("field", "value"), [("functions", [{"name": "f"}])])
async def test_what_is_to_come_is_refused_as_not_supported_yet(client, field: str, value: object) -> None:
    response = await client.post(PATH, json=BODY | {field: value})
    assert response.status_code == 400
    assert "not supported yet" in response.json()["error"]["message"]


async def test_a_stream_begins_with_the_role_and_ends_with_a_bare_finish(world, client) -> None:
    world.engine.say("hello 🙂 world")
    chunks = await stream(client)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(delta.keys() == {"content"} and delta["content"] for delta in deltas[1:-1])
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "hello 🙂 world"
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert finishes == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("step_size", [1, 3, 100])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_says_what_the_whole_answer_says(world, client, step_size: int, n: int) -> None:
    world.engine.step_size = step_size
    fields = {"n": n, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, "prompt_logprobs": 1}
    whole = await ask(client, **fields)
    chunks = await stream(client, stream_options={"include_usage": True}, **fields)
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        logprobs = [item for part in parts if part["logprobs"] for item in part["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
        assert [token for part in parts for token in part["token_ids"] or []] == choice["token_ids"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert parts[-1]["delta"] == {}
    for field in ("prompt_logprobs", "prompt_token_ids"):
        assert [chunk[field] for chunk in chunks] == [whole[field]] + [None] * (len(chunks) - 1)


@pytest.mark.parametrize("step_size", [1, 3, 100])
@pytest.mark.parametrize("n", [1, 3])
async def test_the_usage_of_a_chunk_counts_the_tokens_that_were_sent(world, client, step_size, n) -> None:
    """The role is no token."""
    world.engine.step_size = step_size
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = await stream(client, n=n, stream_options=options, return_token_ids=True)
    num_sent = 0
    for chunk in chunks:
        (choice,) = chunk["choices"]
        num_sent += len(choice["token_ids"] or [])
        assert chunk["usage"]["completion_tokens"] == num_sent
        assert num_sent > 0 or choice["delta"] == {"role": "assistant", "content": ""}
    assert last["usage"]["completion_tokens"] == num_sent
    chunks = await stream(client, n=n, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in chunks)


async def test_fields_that_were_not_asked_for_are_not_there(client) -> None:
    fields = {"prompt_logprobs", "prompt_token_ids", "token_ids"}
    for answer in [await ask(client), *await stream(client)]:
        assert not fields & (answer.keys() | answer["choices"][0].keys())


async def test_logprobs_name_tokens_their_bytes_and_the_most_likely(world, client) -> None:
    world.engine.say("é🙂")
    content = (await ask(client, logprobs=True, top_logprobs=3))["choices"][0]["logprobs"]["content"]
    joined = b"".join(bytes(item["bytes"]) for item in content)
    assert joined == "é🙂</s>".encode()
    assert all(len(item["top_logprobs"]) == 3 for item in content)
    content = (await ask(client, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert all(item["top_logprobs"] == [] for item in content)


async def test_the_output_may_be_as_long_as_the_context_leaves(world, client) -> None:
    await ask(client, max_tokens=None)
    request = world.engine.requests[-1]
    assert request.params.max_tokens == 256 - len(request.prompt_token_ids)
    await ask(client, max_completion_tokens=7, max_tokens=9)
    assert world.engine.requests[-1].params.max_tokens == 7


async def test_a_conversation_that_fills_the_context_is_refused(client) -> None:
    messages = [{"role": "user", "content": "x" * 300}]
    response = await client.post(PATH, json=BODY | {"messages": messages, "max_tokens": None})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("role", ["ipython", "function", "observation", "ASSISTANT", "你", "system", "developer"])
async def test_any_role_is_taken_that_the_template_takes(role: str) -> None:
    world = make_world("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}")
    async with connect(world) as client:
        body = {"model": "tiny", "messages": [{"role": role, "content": "hi", "name": "bob"}]}
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert "x-ignored-fields" not in response.headers
    written = "system" if role == "developer" else role
    assert world.tokenizer.decode(world.engine.requests[0].prompt_token_ids) == f"<{written}>hi"
