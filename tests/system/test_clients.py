"""The clients that people have, over real HTTP, against a real model."""

import asyncio
import json
import random
import shutil
import string
import subprocess
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI


@pytest.fixture
def openai(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_completions_streamed_and_not(openai):
    request = {"model": "tiny", "prompt": "hello 你好", "max_tokens": 40, "temperature": 0.9, "seed": 7}
    whole = openai.completions.create(**request)
    parts = list(openai.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 40
    assert whole.choices[0].finish_reason == "length"
    assert whole.id.startswith("cmpl-")


def test_openai_chat_streamed_and_not(openai):
    request = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        "max_completion_tokens": 30,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = openai.chat.completions.create(**request)
    parts = list(openai.chat.completions.create(**request, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in whole.choices[0].logprobs.content)


def test_openai_many_choices_and_prompts(openai):
    response = openai.completions.create(model="tiny", prompt=["a", "b"], n=3, max_tokens=4, seed=1)
    assert [choice.index for choice in response.choices] == list(range(6))
    assert response.usage.completion_tokens == 24
    again = openai.completions.create(model="tiny", prompt=["a", "b"], n=3, max_tokens=4, seed=1)
    assert [choice.text for choice in again.choices] == [choice.text for choice in response.choices]


def test_openai_sees_readable_errors(openai):
    with pytest.raises(NotFoundError, match="nothing-like-it"):
        openai.completions.create(model="nothing-like-it", prompt="a")
    with pytest.raises(BadRequestError, match="512"):
        openai.completions.create(model="tiny", prompt="a", max_tokens=10_000)
    assert [model.id for model in openai.models.list()] == ["tiny"]


def test_stop_strings_end_the_text_before_them(openai):
    request = {"model": "tiny", "prompt": "hello", "max_tokens": 60, "temperature": 0}
    text = openai.completions.create(**request).choices[0].text
    stop = text[10:13]
    stopped = openai.completions.create(**request, stop=stop).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]


def test_constraints_that_leave_no_token_later_on_are_the_clients_mistake(server):
    """The first "a" is allowed, and no token after it."""
    [token] = server.client.post("/tokenize", json={"prompt": "a"}).json()["tokens"]
    body = {
        "model": "tiny", "prompt": "b", "max_tokens": 5, "ignore_eos": True, "allowed_token_ids": [token],
        "bad_words": ["aa"],
    }  # fmt: skip
    answer = server.client.post("/v1/completions", json=body | {"max_tokens": 1})
    assert answer.json()["choices"][0]["text"] == "a"
    refused = server.client.post("/v1/completions", json=body)
    assert refused.status_code == 400, refused.text
    assert "no token is allowed" in refused.json()["error"]["message"]
    with server.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        *_, error, done = [line for line in response.iter_lines() if line]
    assert '"type":"invalid_request_error"' in error
    assert done == "data: [DONE]"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on this machine")
def test_curl_streams(server):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "stream": True, "ignore_eos": True}
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json"]
    result = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, check=True)
    events = [line for line in result.stdout.split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events)
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


async def test_what_clients_count_is_what_the_metrics_say(start_server):
    counted: Counter[str] = Counter()
    rng = random.Random(1)

    async def one(client: AsyncOpenAI, index: int) -> None:
        request = {
            "model": "tiny",
            "prompt": "x" * rng.randrange(1, 60),
            "max_tokens": rng.randrange(1, 30),
            "n": rng.choice([1, 1, 2]),
            "seed": index,
            "stop": rng.choice([None, "a", "e"]),
        }
        if index % 2:
            response = await client.completions.create(**request)
            usage, choices = response.usage, response.choices
        else:
            stream = await client.completions.create(**request, stream=True, stream_options={"include_usage": True})
            chunks = [chunk async for chunk in stream]
            usage = chunks[-1].usage
            choices = [choice for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        counted["prompt"] += usage.prompt_tokens
        counted["output"] += usage.completion_tokens
        counted["requests"] += 1
        counted["choices"] += len(choices)

    with start_server() as server:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(one(client, i) for i in range(60)))
            with pytest.raises(BadRequestError):
                await client.completions.create(model="tiny", prompt="x", max_tokens=0)
        assert server.metric("peregrine_prompt_tokens_total") == counted["prompt"]
        assert server.metric("peregrine_generation_tokens_total") == counted["output"]
        ok = sum(server.metric("peregrine_requests_total", outcome=outcome) for outcome in ("stop", "length"))
        assert ok == counted["requests"] == 60
        assert server.metric("peregrine_requests_total", outcome="invalid") == 1


def test_schemathesis_finds_no_server_error(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: Counter[str] = Counter()

    for operation in schema.get_all_operations():
        run_one = given(case=operation.ok().as_strategy())(
            settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)(
                lambda case: _call(case, seen)
            )
        )
        run_one()
    assert len(seen) >= 10
    server.wait_until_ready(1)


def _call(case, seen: Counter[str]) -> None:
    response = case.call(timeout=60)
    seen[case.path] += 1
    assert response.status_code < 500, f"{case.as_curl_command()}\n{response.text}"
    if response.status_code >= 400:
        error = response.json()["error"]
        if case.path.startswith("/v1/messages"):
            assert set(error) == {"message", "type"}
        elif case.path.startswith("/api/"):
            assert isinstance(error, str)
        else:
            assert set(error) == {"message", "type", "param", "code"}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "prompt",
    "n",
    "best_of",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "logprobs",
    "echo",
    "stop",
    "stop_token_ids",
    "seed",
    "stream",
    "stream_options",
    "suffix",
    "user",
    "ignore_eos",
    "min_tokens",
    "allowed_token_ids",
    "bad_words",
    "truncate_prompt_tokens",
    "return_token_ids",
    "prompt_logprobs",
    "priority",
    "cache_salt",
    "speculation",
    "timeout",
    "timing",
    "strict",
    "response_format",
    "add_special_tokens",
    "skip_special_tokens",
    "unknown_field",
]
PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(0, 20),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(0, 400),
        "min_p": st.floats(0, 1),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.01, 3),
        "logit_bias": st.dictionaries(st.integers(0, 319).map(str), st.floats(-100, 100), max_size=5),
        "logprobs": st.integers(0, 20),
        "echo": st.booleans(),
        "stop": st.text(max_size=3) | st.lists(st.text(min_size=1, max_size=3), max_size=4),
        "min_tokens": st.integers(0, 20),
        "allowed_token_ids": st.lists(st.integers(0, 330), max_size=4),
        "bad_words": st.lists(st.text(max_size=4), max_size=4),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "prompt_logprobs": st.integers(0, 5),
        "n": st.integers(1, 4),
        "stream": st.booleans(),
    },
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(plausible=PLAUSIBLE, strange=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=2))
def test_no_request_body_breaks_the_server(server, plausible, strange):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4, **plausible, **strange}
    response = server.client.post(
        "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert response.status_code < 500, (body, response.text)
    assert '"code": "internal' not in response.text
    assert server.client.get("/health").status_code == 200


def test_a_request_is_explained_by_what_the_engine_did(server):
    """Its parts are those of the wall clock, and its steps are in the trace."""
    prompt = "hello world of tokens and blocks " * 6
    server.complete(prompt + "one", max_tokens=4, seed=1)
    headers = {"X-Request-Id": "explained"}
    body = {"model": "tiny", "prompt": prompt + "two", "max_tokens": 20, "seed": 1, "ignore_eos": True}
    assert server.client.post("/v1/completions", json=body, headers=headers).status_code == 200
    told = server.client.get("/v1/requests/explained/explain").json()
    seconds = told["seconds"]
    parts = [seconds[name] for name in ("before_queue", "queued", "prefill", "delivery")]
    assert sum(parts) == pytest.approx(seconds["time_to_first_token"], abs=0.001)
    assert seconds["time_to_first_token"] + seconds["decode"] == pytest.approx(seconds["total"], abs=0.001)
    assert told["prompt"]["cached_tokens"] > 0
    assert told["prompt"]["shared_tokens"] >= told["prompt"]["cached_tokens"]
    assert told["output"]["tokens"] == 20
    events = server.client.get("/v1/server/trace").json()["traceEvents"]
    steps = [event for event in events if event["ph"] == "X" and event["name"].endswith(" tokens")]
    assert sum(step["args"]["output_tokens"] for step in steps) >= 20
    assert any(step["args"]["prompt_tokens"] for step in steps)
    [whole] = [event for event in events if event["ph"] == "b" and event["name"] == "cmpl-explained"]
    assert any(step["ts"] >= whole["ts"] for step in steps), "one clock"


def test_the_engine_is_still_the_first_one(server):
    """Runs last in this module: nothing above restarted the engine."""
    assert server.metric("peregrine_engine_restarts_total") == 0
    assert server.metric("peregrine_kv_blocks", state="owned") == 0
