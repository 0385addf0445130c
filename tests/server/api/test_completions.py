"""POST /v1/completions: what the answers say."""

from __future__ import annotations

import pytest

from engine.types import RequestTiming
from tests.support.server_world import events

PATH = "/v1/completions"
BODY = {"model": "tiny", "prompt": "hello", "seed": 1}


async def ask(client, **fields) -> dict:
    response = await client.post(PATH, json=BODY | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client, **fields) -> list[dict]:
    response = await client.post(PATH, json=BODY | fields | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events(response.text)


def texts(chunks: list[dict]) -> dict[int, str]:
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


async def test_an_answer_has_everything_that_openai_says_it_has(world, client) -> None:
    world.engine.say("world")
    world.engine.num_cached_tokens = 1
    answer = await ask(client, prompt="hello world")
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["system_fingerprint"] == "fp_test"
    assert answer["created"] > 1_600_000_000
    assert answer["choices"] == [
        {"index": 0, "text": "world", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    usage = answer["usage"]
    num_prompt = len(world.engine.requests[0].prompt_token_ids)
    num_output = len(world.engine.script(world.engine.requests[0]))
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (num_prompt, num_output)
    assert usage["total_tokens"] == num_prompt + num_output
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
    drafts = usage["completion_tokens_details"]
    assert drafts["accepted_prediction_tokens"] + drafts["rejected_prediction_tokens"] == num_output


@pytest.mark.parametrize("step_size", [1, 2, 5, 100])
@pytest.mark.parametrize(
    "fields", [{}, {"n": 3}, {"prompt": ["a", "b"], "n": 2}, {"echo": True}, {"stop": ["e", "o w"]}]
)
async def test_a_stream_says_what_the_whole_answer_says(world, client, step_size: int, fields: dict) -> None:
    world.engine.step_size = step_size
    whole = await ask(client, max_tokens=40, **fields)
    chunks = await stream(client, max_tokens=40, stream_options={"include_usage": True}, **fields)
    assert texts(chunks) == {choice["index"]: choice["text"] for choice in whole["choices"]}
    *content, last = chunks
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in content)
    ends = {c["index"]: c["finish_reason"] for chunk in content for c in chunk["choices"] if c["finish_reason"]}
    assert ends == {choice["index"]: choice["finish_reason"] for choice in whole["choices"]}
    num_ends = sum(c["finish_reason"] is not None for chunk in content for c in chunk["choices"])
    assert num_ends == len(whole["choices"])


async def test_chunks_carry_no_usage_unless_asked(client) -> None:
    assert all("usage" not in chunk for chunk in await stream(client))
    chunks = await stream(client, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in chunks)
    chunks = await stream(client, stream_options={"continuous_usage_stats": False, "include_usage": True})
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


@pytest.mark.parametrize("step_size", [1, 3, 100])
@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"prompt": ["a", "b"], "stop": ["e", "o w"]}])
async def test_the_usage_of_a_chunk_counts_the_tokens_that_were_sent(world, client, step_size, fields) -> None:
    world.engine.step_size = step_size
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = await stream(client, stream_options=options, return_token_ids=True, **fields)
    num_sent = 0
    for chunk in chunks:
        num_sent += sum(len(choice["token_ids"]) for choice in chunk["choices"])
        usage = chunk["usage"]
        assert usage["completion_tokens"] == num_sent
        assert usage["total_tokens"] == usage["prompt_tokens"] + num_sent
        assert usage["completion_tokens_details"]["accepted_prediction_tokens"] <= num_sent
    assert last["usage"]["completion_tokens"] == num_sent


async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(world, client) -> None:
    answer = await ask(client, prompt=["a", "b", "c"], n=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    prompts = [request.prompt_token_ids for request in world.engine.requests]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 96
    assert world.admission.admitted == [(6, 6)]


async def test_a_stop_string_ends_the_text_and_the_engines_work(world, client) -> None:
    world.engine.say("hello world of tokens")
    world.engine.step_size = 3
    answer = await ask(client, stop=[" wor", "zzz"], max_tokens=100)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello", "stop", " wor")
    assert len(world.engine.aborted) == 1
    included = await ask(client, stop=" wor", max_tokens=100, include_stop_str_in_output=True)
    assert included["choices"][0]["text"] == "hello wor"


async def test_usage_counts_the_tokens_up_to_the_stop_string(world, client) -> None:
    world.engine.say("hello world of tokens")
    world.engine.step_size = 100
    answer = await ask(client, stop="world", max_tokens=100, return_token_ids=True)
    token_ids = answer["choices"][0]["token_ids"]
    assert answer["usage"]["completion_tokens"] == len(token_ids)
    assert world.tokenizer.decode(token_ids) == "hello world"
    assert world.metrics.num_tokens == len(token_ids)


async def test_a_stop_token_is_named_if_the_client_asked_for_it(world, client) -> None:
    world.engine.say("hello world")
    stop = world.tokenizer.encode(" world", add_special_tokens=False)[0]
    choice = (await ask(client, stop_token_ids=[stop]))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello", "stop", stop)
    choice = (await ask(client, stop_token_ids=[stop], include_stop_str_in_output=True))["choices"][0]
    assert choice["text"] == "hello world"
    choice = (await ask(client))["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


async def test_max_tokens_ends_with_length(client) -> None:
    answer = await ask(client, max_tokens=3)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


async def test_echo_puts_the_prompt_before_the_text(world, client) -> None:
    world.engine.say(" world")
    assert (await ask(client, echo=True))["choices"][0]["text"] == "hello world"
    token_ids = world.tokenizer.encode("héllo", add_special_tokens=False)
    assert (await ask(client, echo=True, prompt=token_ids))["choices"][0]["text"] == "héllo world"


async def test_an_echo_of_no_tokens_scores_the_prompt(world, client) -> None:
    answer = await ask(client, prompt="hello world", echo=True, max_tokens=0, logprobs=1)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hello world", "length")
    assert answer["usage"]["completion_tokens"] == 0
    assert choice["logprobs"]["tokens"] == ["hello", " world"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]
    assert world.metrics.num_tokens == 0


async def test_logprobs_are_parallel_lists_with_offsets_into_the_text(world, client) -> None:
    world.engine.say("the lazy dog")
    choice = (await ask(client, logprobs=2))["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"][:-1]) == choice["text"]
    assert {len(values) for values in logprobs.values()} == {len(logprobs["tokens"])}
    for token, offset in zip(logprobs["tokens"][:-1], logprobs["text_offset"], strict=False):
        assert choice["text"][offset : offset + len(token)] == token
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))


async def test_echoed_logprobs_cover_the_prompt_and_the_text(world, client) -> None:
    world.engine.say(" of tokens")
    fields = {"prompt": "hello world", "echo": True, "logprobs": 1}
    choice = (await ask(client, **fields))["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for token, offset in zip(logprobs["tokens"][:-1], logprobs["text_offset"], strict=False):
        assert choice["text"][offset : offset + len(token)] == token
    streamed: dict[str, list] = {}
    for chunk in await stream(client, **fields):
        for key, values in chunk["choices"][0]["logprobs"].items():
            streamed.setdefault(key, []).extend(values)
    assert streamed == logprobs


async def test_tokens_can_be_named_by_their_ids(world, client) -> None:
    world.engine.say("hello")
    logprobs = (await ask(client, logprobs=0, return_tokens_as_token_ids=True))["choices"][0]["logprobs"]
    expected = [f"token_id:{token}" for token in world.engine.script(world.engine.requests[0])]
    assert logprobs["tokens"] == expected


async def test_logprobs_of_minus_infinity_are_numbers(world, client) -> None:
    from engine.types import TokenLogprobs

    world.engine.logprobs = lambda token, top: TokenLogprobs(token, float("-inf"), 9, [5], [float("-inf")])
    logprobs = (await ask(client, logprobs=1))["choices"][0]["logprobs"]
    assert set(logprobs["token_logprobs"]) == {-9999.0}


async def test_prompt_logprobs_are_maps_from_ids(world, client) -> None:
    fields = {"prompt": "hello world", "prompt_logprobs": 2}
    found = (await ask(client, **fields))["choices"][0]["prompt_logprobs"]
    prompt = world.engine.requests[0].prompt_token_ids
    assert found[0] is None
    for token_id, known in zip(prompt[1:], found[1:], strict=True):
        own = known[str(token_id)]
        assert (own["logprob"], own["rank"]) == (-0.5, 1)
        assert own["decoded_token"] == world.tokenizer.token_text(token_id)
        assert len(known) == 2
    chunks = await stream(client, **fields)
    assert [chunk["choices"][0]["prompt_logprobs"] for chunk in chunks] == [found] + [None] * (len(chunks) - 1)


async def test_token_ids_are_returned_if_asked_for(world, client) -> None:
    choice = (await ask(client, return_token_ids=True))["choices"][0]
    request = world.engine.requests[0]
    assert choice["prompt_token_ids"] == request.prompt_token_ids
    assert choice["token_ids"] == world.engine.script(request)
    chunks = await stream(client, return_token_ids=True)
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == choice["token_ids"]
    told = [chunk["choices"][0]["prompt_token_ids"] for chunk in chunks]
    assert told == [request.prompt_token_ids] + [None] * (len(chunks) - 1)
    unasked = (await ask(client))["choices"][0]
    assert not unasked.keys() & {"token_ids", "prompt_token_ids", "prompt_logprobs"}


async def test_timing_adds_up_to_the_wall_time(world, client) -> None:
    world.engine.delay = 0.01
    world.engine.num_restarts = 3
    timings = [(await ask(client, timing=True, n=2, max_tokens=4))["timing"]]
    chunks = await stream(client, timing=True, n=2, max_tokens=4)
    timings += [chunk["timing"] for chunk in chunks if "timing" in chunk]
    assert len(timings) == 2
    for timing in timings:
        parts = timing["server"] + timing["queued"] + timing["prefill"] + timing["decode"]
        assert parts == pytest.approx(timing["total"], rel=0.01)
        assert timing["total"] >= 0.03
        assert timing["prefill_chunks"] == 2
        assert timing["restarts_survived"] == 0
        assert all(value >= 0 for value in timing.values())


async def test_timing_of_a_choice_that_a_stop_string_ended_is_what_the_server_saw(world, client) -> None:
    world.engine.say("hello world of tokens")
    world.engine.first_delay, world.engine.delay = 0.02, 0.01
    timing = (await ask(client, timing=True, stop="of"))["timing"]
    assert timing["prefill"] >= 0.019
    assert timing["decode"] >= 0.009
    assert timing["server"] >= 0
    world.engine.first_timing = RequestTiming(
        queued=0.004, prefill=0.015, decode=0.0, num_prefill_chunks=2, num_preemptions=0, num_drafts=0,
        num_accepted_drafts=0,
    )  # fmt: skip
    timing = (await ask(client, timing=True, stop="of"))["timing"]
    assert (timing["queued"], timing["prefill"], timing["prefill_chunks"]) == (0.004, 0.015, 2)
    assert timing["decode"] >= 0.009


async def test_an_answer_without_text_still_ends(world, client) -> None:
    world.engine.script = lambda request: [1]
    choice = (await ask(client))["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    chunks = await stream(client)
    assert [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in chunks] == [("", "stop")]
