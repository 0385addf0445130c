"""The official client over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from server.generation.answer_store import AnswerStore
from tests.support.server_world import wait_until

MESSAGES = [{"role": "user", "content": "hello 你好"}]


@pytest.fixture
def sdk(world) -> Iterator[openai.OpenAI]:
    with world.serve() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chats_stream_and_whole_agree(world, sdk) -> None:
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "seed": 7}
    whole = sdk.chat.completions.create(**fields)
    stream = sdk.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"


def test_completions_stream_and_whole_agree(world, sdk) -> None:
    fields = {"model": "tiny", "prompt": ["hello", "world"], "n": 2, "seed": 7, "logprobs": 2}
    whole = sdk.completions.create(**fields)
    texts = [""] * 4
    for chunk in sdk.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert whole.choices[0].logprobs.token_logprobs == [-0.5] * 16


def test_chat_logprobs_are_parsed(world, sdk) -> None:
    answer = sdk.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, max_completion_tokens=4
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    assert all(len(item.top_logprobs) == 2 and item.bytes is not None for item in content)


def test_extensions_go_through_the_extra_body(world, sdk) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "speculation": {"enabled": False}, "timing": True}
    answer = sdk.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=extra, max_tokens=3)
    assert answer.timing["total"] > 0
    params = world.engine.requests[0].params
    assert (params.top_k, params.min_p, params.repetition_penalty, params.num_drafts) == (5, 0.1, 1.2, 0)


def test_errors_arrive_as_the_clients_own_exceptions(world, sdk) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.completions.create(model="gpt-9", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        sdk.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert wrong.value.param == "temperature"
    world.engine.fail_after = 2
    with pytest.raises(openai.APIError, match="the engine broke"):
        list(sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    world.engine.fail_after = 0
    with pytest.raises(openai.InternalServerError):
        sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)


def test_closing_a_stream_aborts_it(world, sdk) -> None:
    world.engine.delay = 0.01
    stream = sdk.completions.create(model="tiny", prompt="a", max_tokens=200, stream=True)
    for number, _ in enumerate(stream):
        if number == 3:
            break
    stream.close()
    wait_until(lambda: len(world.engine.aborted) == 1)


async def test_the_asynchronous_client_streams(world) -> None:
    with world.serve() as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9, stream=True)
            finishes = [chunk.choices[0].finish_reason async for chunk in stream]
    assert finishes[-1] == "length"


def test_many_streams_at_once_are_not_mixed_up(world) -> None:
    """Sixteen streams over one connection pool; each must say what its own prompt leads to."""
    import asyncio

    world.engine.delay = 0.001

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        body = {"model": "tiny", "prompt": [5 + number], "seed": number, "max_tokens": 30, "stream": True}
        body["return_token_ids"] = True
        found: list[int] = []
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    found += httpx.Response(200, text=line[6:]).json()["choices"][0]["token_ids"]
        request = next(r for r in world.engine.requests if r.params.seed == number)
        assert found == world.engine.invent(request)

    async def ask_all(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            await asyncio.gather(*(ask(client, number) for number in range(16)))

    with world.serve() as url:
        asyncio.run(ask_all(url))
    assert world.metrics.outcomes == ["length"] * 16


def test_responses_stream_and_whole_agree(world, sdk) -> None:
    fields = {"model": "tiny", "input": "hello 你好", "max_output_tokens": 30, "extra_body": {"seed": 7}}
    whole = sdk.responses.create(**fields)
    with sdk.responses.stream(**fields) as stream:
        events = list(stream)
    kinds, final = [event.type for event in events], events[-1].response
    assert final.output_text == whole.output_text
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert final.status == whole.status == "incomplete"
    assert final.usage == whole.usage


def test_a_response_is_followed_by_its_id_or_by_its_items(world, sdk) -> None:
    world.state.answers = AnswerStore(max_answers=10, max_bytes=2**20)
    world.engine.say("hi there")
    first = sdk.responses.create(model="tiny", input="hello")
    by_id = sdk.responses.create(model="tiny", input="and?", previous_response_id=first.id)
    items = [{"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "and?"}]
    by_items = sdk.responses.create(model="tiny", input=items)
    assert by_id.usage.input_tokens == by_items.usage.input_tokens > first.usage.input_tokens
    assert sdk.responses.retrieve(by_id.id).output_text == "hi there"
    assert [item.type for item in sdk.responses.input_items.list(by_id.id)] == ["message"]
    sdk.responses.delete(by_id.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(by_id.id)


def test_a_response_that_fails_in_its_stream_says_so_once(world, sdk) -> None:
    world.engine.fail_after = 2
    *_, last = sdk.responses.create(model="tiny", input="hello", stream=True)
    assert (last.type, last.response.status) == ("response.failed", "failed")
    with pytest.raises(openai.NotFoundError):
        sdk.responses.create(model="gpt-9", input="hello")


def test_embeddings_are_the_same_in_both_encodings(world, sdk) -> None:
    texts = ["hello", "hello world"]
    encoded = sdk.embeddings.create(model="tiny", input=texts)  # the client asks for base64
    numbers = sdk.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for one, other in zip(encoded.data, numbers.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding)
    assert encoded.usage == numbers.usage
