"""Every field of the two generation endpoints: a value that is taken, and values that are refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from server.protocol.request_fields import CompletionBody
from tests.support.server_world import connect

COMPLETION = {"model": "tiny", "prompt": "hello"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
ROUTES = {"completion": ("/v1/completions", COMPLETION), "chat": ("/v1/chat/completions", CHAT)}

SHARED_ACCEPTED = [
    {"n": 1}, {"n": 128}, {"n": 2, "temperature": 0}, {"n": 2.0},
    {"max_tokens": 1}, {"max_tokens": 200}, {"max_tokens": 3.0}, {"min_tokens": 3.0}, {"seed": 1e15}, {"top_k": 5.0},
    {"temperature": 0}, {"temperature": 2}, {"temperature": 1}, {"temperature": 1e-300},
    {"top_p": 1}, {"top_p": 0.001}, {"top_k": 0}, {"top_k": -1}, {"top_k": 50}, {"min_p": 0}, {"min_p": 1},
    {"frequency_penalty": -2}, {"frequency_penalty": 2}, {"presence_penalty": -2.0}, {"presence_penalty": 2.0},
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.5},
    {"logit_bias": {"5": -100, "6": 100}}, {"logit_bias": {"329": 1.5}}, {"logit_bias": {}},
    {"stop": "x"}, {"stop": list("abcdefghijklmnop")}, {"stop": []}, {"stop": "x" * 1024},
    {"stop_token_ids": [5, 6]}, {"include_stop_str_in_output": True},
    {"seed": 2**63 - 1}, {"seed": -(2**63)}, {"seed": 0},
    {"stream": True}, {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"stream": False, "stream_options": {"include_usage": True}}, {"stream_options": {"include_obfuscation": False}},
    {"user": "u"}, {"store": True}, {"metadata": {"a": "b"}}, {"service_tier": "auto"}, {"prompt_cache_key": "k"},
    {"ignore_eos": True}, {"min_tokens": 3}, {"skip_special_tokens": False}, {"spaces_between_special_tokens": False},
    {"add_special_tokens": True}, {"allowed_token_ids": [5]}, {"bad_words": ["bad", "worse"]},
    {"truncate_prompt_tokens": 1}, {"truncate_prompt_tokens": -1}, {"truncation_side": "left"},
    {"truncate_prompt_tokens": 1, "truncation_side": "right"},
    {"return_token_ids": True}, {"return_tokens_as_token_ids": True}, {"prompt_logprobs": 0}, {"prompt_logprobs": 20},
    {"priority": 0}, {"cache_salt": "salt"}, {"request_id": "mine-1"}, {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object", "schema": {}}},
    {"response_format": {"type": "json_schema", "json_schema": {}}}, {"structured_outputs": {"regex": "a+"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": True, "strict": True}}},
    {"guided_json": {}}, {"guided_json": "{}"}, {"guided_choice": ["a", "", "\u00e9\n"]}, {"guided_regex": "a/b"},
    {"guided_grammar": 'start: "a"'}, {"guided_grammar": 'root ::= "a" | "b"'},
    {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
    {"guided_json": {}, "guided_whitespace_pattern": "[ ]{0,2}", "guided_decoding_backend": "xgrammar"},
    {"speculation": {"enabled": False}}, {"speculation": {"num_drafts": 3}}, {"speculation": {}},
    {"timeout": 30}, {"timing": True}, {"strict": True}, {"echo": True},
]  # fmt: skip
SHARED_REFUSED = [
    {"model": None}, {"model": 3}, {"model": ["tiny"]},
    {"n": 0}, {"n": 129}, {"n": 1.5}, {"n": "1"}, {"n": True}, {"n": 10**30},
    {"max_tokens": -1}, {"max_tokens": "16"}, {"max_tokens": 256}, {"max_tokens": 10**25}, {"max_tokens": 1.5},
    {"max_tokens": 1e300}, {"max_tokens": 257.0},
    {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": "1"}, {"temperature": 1e308}, {"temperature": False},
    {"top_p": 0}, {"top_p": 1.1}, {"top_p": -1}, {"top_k": -2}, {"top_k": 1.5}, {"min_p": -0.1}, {"min_p": 1.1},
    {"frequency_penalty": -2.1}, {"frequency_penalty": 2.1}, {"presence_penalty": -2.1}, {"presence_penalty": 2.1},
    {"repetition_penalty": 0}, {"repetition_penalty": -1}, {"repetition_penalty": 1e300},
    {"logit_bias": {"x": 1}}, {"logit_bias": {"1.5": 1}}, {"logit_bias": {"330": 1}}, {"logit_bias": {"-1": 1}},
    {"logit_bias": {"5": 101}}, {"logit_bias": {"5": -100.5}}, {"logit_bias": {"5": "1"}}, {"logit_bias": [5]},
    {"logit_bias": {"9" * 5000: 1}}, {"logit_bias": {"٣": 1}}, {"logit_bias": {str(i): 1 for i in range(1025)}},
    {"stop": ""}, {"stop": [""]}, {"stop": list("abcdefghijklmnopq")}, {"stop": 5}, {"stop": "x" * 1025},
    {"stop": ["a"] * 9999},
    {"stop_token_ids": [330]}, {"stop_token_ids": [-1]}, {"stop_token_ids": "5"}, {"stop_token_ids": [10**20]},
    {"include_stop_str_in_output": "yes"}, {"seed": 2**63}, {"seed": -(2**63) - 1}, {"seed": 1.5}, {"seed": "1"},
    {"stream": "true"}, {"stream": 1}, {"stream_options": {"include_usage": 1}}, {"stream_options": True},
    {"stream_options": {"include_obfuscation": True}}, {"user": 5}, {"metadata": [1]}, {"ignore_eos": 0},
    {"min_tokens": -1}, {"min_tokens": 17, "max_tokens": 16}, {"min_tokens": "1"}, {"skip_special_tokens": "no"},
    {"spaces_between_special_tokens": 1}, {"add_special_tokens": "x"},
    {"allowed_token_ids": []}, {"allowed_token_ids": [330]}, {"allowed_token_ids": [5] * 331},
    {"allowed_token_ids": [True]}, {"allowed_token_ids": ["5"]}, {"allowed_token_ids": [5.0]},
    {"allowed_token_ids": [5, -1]}, {"allowed_token_ids": [[5]]}, {"allowed_token_ids": {"5": 1}},
    {"allowed_token_ids": [5, 10**30]}, {"stop_token_ids": [5] * 1025}, {"bad_words": [""]}, {"bad_words": "bad"},
    {"truncate_prompt_tokens": 0}, {"truncate_prompt_tokens": -2}, {"truncate_prompt_tokens": 1.5},
    {"truncation_side": "middle"}, {"truncation_side": 1},
    {"return_token_ids": "y"}, {"return_tokens_as_token_ids": 2}, {"prompt_logprobs": -1}, {"prompt_logprobs": 21},
    {"priority": 1.5}, {"priority": 2**31}, {"cache_salt": ""}, {"cache_salt": "x" * 257}, {"request_id": "a b"},
    {"request_id": ""}, {"request_id": "x" * 129}, {"response_format": {"type": "json"}},
    {"response_format": "json_object"}, {"response_format": {}}, {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
    {"response_format": {"type": "json_object", "schema": "{}"}}, {"response_format": {"type": "structural_tag"}},
    {"structured_outputs": {}}, {"structured_outputs": {"regex": ["a"]}}, {"structured_outputs": "a+"},
    {"structured_outputs": {"regex": "a", "choice": ["a"]}}, {"guided_json": {}, "guided_regex": "a"},
    {"response_format": {"type": "json_object"}, "guided_regex": "a"}, {"guided_choice": []}, {"guided_choice": [1]},
    {"guided_json": "{"}, {"guided_json": 5}, {"guided_regex": "("}, {"guided_grammar": "nonsense"},
    {"structured_outputs": {"choice": ["a"] * 4097}}, {"guided_json": {"type": "strin"}},
    {"use_beam_search": True}, {"speculation": True}, {"speculation": {"enabled": "no"}},
    {"speculation": {"num_drafts": -1}}, {"speculation": {"num_drafts": 65}},
    {"timeout": 0}, {"timeout": -1}, {"timeout": "5"}, {"timeout": 1e9}, {"timing": "x"}, {"strict": 1}, {"echo": 1},
    {"strict": True, "bogus": 1}, {"strict": True, "stream_options": {"bogus": 1}},
]  # fmt: skip
COMPLETION_ACCEPTED = [
    {"prompt": ["a", "b"]}, {"prompt": [5, 6]}, {"prompt": [[5], [6, 7]]}, {"prompt": ["a"] * 64, "max_tokens": 1},
    {"best_of": 1}, {"n": 2, "best_of": 2}, {"max_tokens": 0, "echo": True}, {"max_tokens": None}, {"suffix": ""},
    {"logprobs": 0}, {"logprobs": 20}, {"echo": True, "logprobs": 2}, {"prompt": [329]},
]  # fmt: skip
COMPLETION_REFUSED = [
    {"prompt": ""}, {"prompt": []}, {"prompt": [""]}, {"prompt": [[]]}, {"prompt": ["a", ""]}, {"prompt": [[5], []]},
    {"prompt": None}, {"prompt": 5}, {"prompt": {"a": 1}}, {"prompt": ["a", 5]}, {"prompt": [5, "a"]},
    {"prompt": [330]}, {"prompt": [-1]}, {"prompt": [2**31]}, {"prompt": [1.0]}, {"prompt": [[330]]},
    {"prompt": [True]},
    {"prompt": ["a"] * 65}, {"prompt": [[5]] * 65}, {"prompt": [5] * 256}, {"prompt": "z" * 100_000},
    {"best_of": 2}, {"n": 2, "best_of": 1}, {"n": 2, "best_of": 3}, {"best_of": 0}, {"max_tokens": 0},
    {"suffix": "end"}, {"logprobs": -1}, {"logprobs": 21}, {"logprobs": True}, {"logprobs": "5"},
]  # fmt: skip
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
IMAGE = {"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}


def message(**fields) -> dict:
    return {"messages": [{"role": "user", "content": "hi", **fields}]}


CHAT_ACCEPTED = [
    *[message(role=role) for role in ("system", "developer", "user", "assistant")],
    message(role="tool", tool_call_id="call-1"), message(content=PARTS), message(name="bob"),
    message(role="assistant", content=None), message(role="assistant", tool_calls=[], refusal=None),
    message(role="assistant", reasoning_content="hm"),
    {"max_completion_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 9999}, {"max_tokens": None},
    {"logprobs": True}, {"logprobs": True, "top_logprobs": 20}, {"logprobs": False},
    {"logprobs": True, "top_logprobs": 0},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    message(role="assistant", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{}"}}]),
    {"reasoning_effort": "low"}, {"include_reasoning": False}, {"reasoning_max_tokens": 0},
    {"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True},
    {"chat_template_kwargs": {"shout": True, "b": "x", "c": 1, "d": 1.5, "e": None}}, {"modalities": ["text"]},
    {"add_generation_prompt": False}, {**message(role="assistant"), "continue_final_message": True},
]  # fmt: skip
CHAT_REFUSED = [
    {"messages": []}, {"messages": None}, {"messages": "hi"}, {"messages": ["hi"]}, {"messages": [{}]},
    message(role="robot"), message(role=None), message(role=""), message(role=5), message(role="r" * 257),
    message(content=None), message(content=5), message(content=[]),
    message(content=[IMAGE]), message(content=[*PARTS, IMAGE]), message(content=[{"type": "text"}]),
    message(content=["hi"]), message(role="assistant", tool_calls=[{"id": "1"}]), message(role="tool", content=None),
    {"max_completion_tokens": 0}, {"max_completion_tokens": 10**9}, {"max_tokens": 0},
    {"logprobs": 1}, {"top_logprobs": 2}, {"logprobs": False, "top_logprobs": 2},
    {"logprobs": True, "top_logprobs": 21},
    {"tools": [{"type": "function", "function": {"name": "f!"}}], "tool_choice": "none"}, {"tool_choice": "required"},
    {"tools": [{"type": "function"}]}, {"reasoning_effort": "some"}, {"reasoning_max_tokens": -1},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}}, {"functions": [{"name": "f"}]},
    {"chat_template_kwargs": {"a": [1]}}, {"chat_template_kwargs": {"a": {}}}, {"chat_template_kwargs": 5},
    {"chat_template_kwargs": {"messages": 1}}, {"chat_template_kwargs": {"eos_token": "x"}},
    {"modalities": ["audio"]}, {"audio": {"voice": "a"}}, {"web_search_options": {}},
    {"add_generation_prompt": True, "continue_final_message": True}, {"add_generation_prompt": "yes"},
]  # fmt: skip


def cases(route: str, shared: list[dict], own: list[dict]) -> list:
    return [pytest.param(route, case, id=f"{route}-{json.dumps(case)[:60]}") for case in [*shared, *own]]


@pytest.mark.parametrize(
    ("route", "fields"),
    cases("completion", SHARED_ACCEPTED, COMPLETION_ACCEPTED) + cases("chat", SHARED_ACCEPTED, CHAT_ACCEPTED),
)
async def test_the_value_is_taken(world, client, route: str, fields: dict) -> None:
    path, body = ROUTES[route]
    response = await client.post(path, json=body | fields)
    assert response.status_code == 200, response.text
    assert "x-ignored-fields" not in response.headers
    assert len(world.metrics.outcomes) == world.metrics.num_arrived == 1


@pytest.mark.parametrize(
    ("route", "fields"),
    cases("completion", SHARED_REFUSED, COMPLETION_REFUSED) + cases("chat", SHARED_REFUSED, CHAT_REFUSED),
)
async def test_the_value_is_refused_with_a_message_that_names_the_field(
    world, client, route: str, fields: dict
) -> None:
    path, body = ROUTES[route]
    response = await client.post(path, json=body | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    blamed = f"{error['param']} {error['message']}"
    assert any(name in blamed for name in fields) or "bogus" in blamed, error
    assert len(error["message"]) < 600
    assert world.engine.requests == []
    assert world.metrics.outcomes == ["invalid"]


@pytest.mark.parametrize("route", ROUTES)
async def test_required_fields_are_required(client, route: str) -> None:
    path, body = ROUTES[route]
    for name in body:
        response = await client.post(path, json={key: value for key, value in body.items() if key != name})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name


@pytest.mark.parametrize("route", ROUTES)
async def test_null_is_the_same_as_absent(world, client, route: str) -> None:
    from server.protocol.chat_fields import ChatBody
    from server.protocol.request_fields import CompletionBody

    path, body = ROUTES[route]
    names = (CompletionBody if route == "completion" else ChatBody).model_fields
    response = await client.post(path, json=dict.fromkeys(names) | body)
    assert response.status_code == 200, response.text
    plain = await client.post(path, json=body)
    first, second = (request.params for request in world.engine.requests)
    assert first.seed != second.seed
    assert {**_fields(first), "seed": 0} == {**_fields(second), "seed": 0}
    assert plain.status_code == 200


def _fields(params) -> dict:
    return {name: getattr(params, name) for name in params.__struct_fields__}


@pytest.mark.parametrize("route", ROUTES)
async def test_unknown_fields_are_named_in_a_header(client, route: str) -> None:
    path, body = ROUTES[route]
    unknown = {"bogus": 1, "stream_options": {"odd": [1]}, "x\r\nSet-Cookie: a": 1, "é🙂": {}, "": 0}
    response = await client.post(path, json=body | unknown)
    assert response.status_code == 200
    named = response.headers["x-ignored-fields"].split(", ")
    assert named[:2] == ["bogus", "x%0D%0ASet-Cookie%3A%20a"]
    assert "stream_options.odd" in named
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize("route", ROUTES)
async def test_many_unknown_fields_do_not_make_a_large_header(client, route: str) -> None:
    path, body = ROUTES[route]
    response = await client.post(path, json=body | {f"{i}" + "x" * 500: 1 for i in range(2000)})
    assert response.status_code == 200
    assert len(response.headers["x-ignored-fields"]) < 8000


@pytest.mark.parametrize("route", ROUTES)
async def test_a_strict_server_refuses_unknown_fields(world, client, route: str) -> None:
    world.configure({"server": {"strict": True}})
    path, body = ROUTES[route]
    assert (await client.post(path, json=body)).status_code == 200
    response = await client.post(path, json=body | {"bogus": 1})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unknown_field"


@pytest.mark.parametrize("route", ROUTES)
async def test_limits_come_from_the_configuration(world, client, route: str) -> None:
    world.configure({"limits": {"max_n": 2, "max_stop_strings": 1, "max_logit_bias": 1, "max_logprobs": 1}})
    path, body = ROUTES[route]
    at_limit = {"n": 2, "stop": ["a"], "logit_bias": {"5": 1}, "prompt_logprobs": 1}
    past_limit = {"n": 3, "stop": ["a", "b"], "logit_bias": {"5": 1, "6": 1}, "prompt_logprobs": 2}
    for name in at_limit:
        assert (await client.post(path, json=body | {name: at_limit[name]})).status_code == 200
        response = await client.post(path, json=body | {name: past_limit[name]})
        assert response.status_code == 400
        assert "limits." in response.json()["error"]["message"]


async def test_an_unknown_model_is_404_and_every_served_name_is_known(client) -> None:
    for path, body in ROUTES.values():
        response = await client.post(path, json=body | {"model": "gpt-9"})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        response = await client.post(path, json=body | {"model": "other-name"})
        assert response.json()["model"] == "other-name"


async def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(client) -> None:
    body = {"model": "tiny", "prompt": [5] * 250, "max_tokens": 6}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    response = await client.post("/v1/completions", json=body | {"max_tokens": 7})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("250", "7", "257", "256"))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": [5] * 256}),
        ("/v1/completions", {"prompt": [5] * 256, "max_tokens": 0, "echo": True}),
        ("/v1/completions", {"prompt": [5] * 256, "max_tokens": 10**6}),
        ("/v1/completions", {"prompt": [5], "max_tokens": 10**6}),
        ("/v1/completions", {"prompt": ["a", "z" * 100_000]}),
        ("/v1/completions", {"prompt": "\u4f60" * 200}),
        ("/v1/completions", {"prompt": [5] * 300, "truncate_prompt_tokens": 256}),
        ("/v1/chat/completions", message(content="\u4f60" * 200)),
        ("/v1/chat/completions", message(content="z" * 100_000)),
        ("/v1/chat/completions", {**message(), "max_tokens": 256}),
        ("/v1/chat/completions", {**message(), "max_completion_tokens": 10**6}),
    ],
)
async def test_clients_know_an_overflow_of_the_context_by_its_code_and_sentence(client, path, fields) -> None:
    response = await client.post(path, json={"model": "tiny", **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    sentence = error["message"].split("; ")[0]
    assert sentence.startswith("This model's maximum context length is 256 tokens")
    assert "prompt is too long" in sentence
    assert error["param"] in fields


@given(
    num_prompt=st.integers(1, 300), cut=st.integers(-1, 250).filter(bool), max_tokens=st.integers(1, 6),
    side=st.sampled_from(["left", "right", None]),
)  # fmt: skip
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_prompt_is_cut_where_the_client_says(world, num_prompt, cut, max_tokens, side) -> None:
    prompt = [5 + number for number in range(num_prompt)]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens}
    async with connect(world) as client:
        fields = {"truncate_prompt_tokens": cut, "truncation_side": side}
        response = await client.post("/v1/completions", json=body | fields)
    assert response.status_code == 200, response.text
    num_kept = min(256 - max_tokens if cut == -1 else cut, num_prompt)
    expected = prompt[:num_kept] if side == "right" else prompt[num_prompt - num_kept :]
    assert world.engine.requests[-1].prompt_token_ids == expected
    assert response.json()["usage"]["prompt_tokens"] == num_kept


async def test_whole_numbers_may_have_a_fraction_of_nothing(world, client) -> None:
    body = {"max_tokens": 3.0, "n": 2.0, "seed": -5.0, "top_k": 7.0, "min_tokens": 1.0, "logprobs": 2.0}
    answer = (await client.post("/v1/completions", json=COMPLETION | body)).json()
    assert answer["usage"]["completion_tokens"] == 6
    params = world.engine.requests[0].params
    assert (params.top_k, params.min_tokens, params.logprobs, params.max_tokens) == (7, 1, 2, 3)
    assert all(type(getattr(params, name)) is int for name in ("seed", "top_k", "min_tokens", "max_tokens"))


async def test_a_priority_needs_the_operator_s_permission(world, client) -> None:
    for priority in (1, -1, 2**31 - 1):
        response = await client.post("/v1/completions", json=COMPLETION | {"priority": priority})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")
        assert "limits.priority" in response.json()["error"]["message"]
    assert (await client.post("/v1/completions", json=COMPLETION | {"priority": 0})).status_code == 200
    world.configure({"limits": {"priority": True}})
    assert (await client.post("/v1/completions", json=COMPLETION | {"priority": -7})).status_code == 200
    assert world.engine.requests[-1].priority == -7


async def test_sampling_fields_reach_the_engine(world, client) -> None:
    world.configure({"limits": {"priority": True}})
    body = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "frequency_penalty": 0.2, "presence_penalty": 0.3,
        "repetition_penalty": 1.1, "logit_bias": {"5": 2}, "allowed_token_ids": [5, 6], "stop_token_ids": [9],
        "min_tokens": 2, "max_tokens": 9, "seed": 11, "priority": 3, "speculation": {"num_drafts": 2}, "logprobs": 4,
    }  # fmt: skip
    await client.post("/v1/completions", json=COMPLETION | body)
    request = world.engine.requests[0]
    expected = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "frequency_penalty": 0.2, "presence_penalty": 0.3,
        "repetition_penalty": 1.1, "logit_bias": {5: 2.0}, "allowed_token_ids": [5, 6], "stop_token_ids": [9, 1],
        "min_tokens": 2, "max_tokens": 9, "seed": 11, "num_drafts": 2, "logprobs": 4,
    }  # fmt: skip
    assert expected.items() <= _fields(request.params).items()
    assert request.priority == 3


async def test_allowed_tokens_are_told_once_each(world, client) -> None:
    for listed, told in [([7, 5, 7, 5], [5, 7]), ([5] * 330, [5]), (list(range(330)), list(range(330)))]:
        await client.post("/v1/completions", json=COMPLETION | {"allowed_token_ids": listed})
        assert world.engine.requests[-1].params.allowed_token_ids == told


async def test_bad_words_are_told_once_each(world, client) -> None:
    await client.post("/v1/completions", json=COMPLETION | {"bad_words": ["bad", "bad", " bad"] * 80})
    told = world.engine.requests[-1].params.bad_words
    assert len(told) == len({tuple(word) for word in told}) == 2


class Unread(list):
    """A list whose items nobody may look at."""

    def __iter__(self):
        raise AssertionError("its items were read")

    __getitem__ = __contains__ = __iter__


@pytest.mark.parametrize("field", ["allowed_token_ids", "stop_token_ids", "bad_words", "stop"])
def test_lists_that_are_too_long_are_refused_before_any_item_is_read(field: str) -> None:
    with pytest.raises(ValidationError, match=r"600000 items are more than the \d+ that are allowed"):
        CompletionBody.model_validate({**COMPLETION, field: Unread([5] * 600_000)})


async def test_defaults_come_from_the_model(world, client) -> None:
    import msgspec

    defaults = {"temperature": 0.6, "top_p": 0.95, "top_k": 20.0}
    world.engine.model = msgspec.structs.replace(world.engine.model, generation_defaults=defaults)
    await client.post("/v1/completions", json=COMPLETION | {"top_p": 0.5})
    params = world.engine.requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.6, 0.5, 20, 16)


async def test_a_negative_top_k_is_off_and_a_tiny_temperature_is_greedy(world, client) -> None:
    await client.post("/v1/completions", json=COMPLETION | {"top_k": -1, "temperature": 1e-300})
    params = world.engine.requests[0].params
    assert (params.top_k, params.temperature) == (0, 0.0)


async def test_drafts_can_be_switched_off(world, client) -> None:
    for speculation, expected in [({"enabled": False, "num_drafts": 4}, 0), ({"enabled": True}, None), (None, None)]:
        await client.post("/v1/completions", json=COMPLETION | {"speculation": speculation})
        assert world.engine.requests[-1].params.num_drafts == expected


async def test_ignoring_the_end_of_sequence_leaves_only_the_asked_stop_tokens(world, client) -> None:
    await client.post("/v1/completions", json=COMPLETION | {"ignore_eos": True, "stop_token_ids": [7, 7]})
    assert world.engine.requests[0].params.stop_token_ids == [7]


async def test_bad_words_are_banned_at_the_beginning_and_after_a_space(world, client) -> None:
    await client.post("/v1/completions", json=COMPLETION | {"bad_words": ["world"]})
    sequences = world.engine.requests[0].params.bad_words
    texts = {world.tokenizer.decode(sequence) for sequence in sequences}
    assert texts == {"world", " world"}


async def test_choices_get_seeds_that_follow_from_the_requests(world, client) -> None:
    body = COMPLETION | {"prompt": ["a", "b"], "n": 3, "seed": 5}
    first = (await client.post("/v1/completions", json=body)).json()
    seeds = [request.params.seed for request in world.engine.requests]
    assert seeds[0] == 5
    assert seeds[:3] == seeds[3:]
    assert len(set(seeds[:3])) == 3
    second = (await client.post("/v1/completions", json=body)).json()
    assert [c["text"] for c in first["choices"]] == [c["text"] for c in second["choices"]]
    world.engine.requests.clear()
    await client.post("/v1/completions", json=body | {"seed": None})
    seeds = [request.params.seed for request in world.engine.requests]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_requests_with_different_salts_share_no_prefix(world, client) -> None:
    salts = []
    for salt in [None, "a", "b", "a"]:
        await client.post("/v1/completions", json=COMPLETION | {"cache_salt": salt})
        salts.append(world.engine.requests[-1].cache_salt)
    assert salts[1] == salts[3]
    assert len(set(salts)) == 3


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    route=st.sampled_from(sorted(ROUTES)), words=st.sets(st.sampled_from("abc!")), ignore_eos=st.booleans(),
    letters=st.sets(st.sampled_from("abc!")), allows_end=st.booleans(), min_tokens=st.integers(0, 2),
)  # fmt: skip
async def test_constraints_that_leave_no_token_are_the_clients_mistake(
    world, route, words, letters, allows_end, min_tokens, ignore_eos
) -> None:
    encode = world.tokenizer.encode
    allowed = [encode(letter, add_special_tokens=False)[0] for letter in sorted(letters)] + [1] * allows_end
    path, body = ROUTES[route]
    fields = {"allowed_token_ids": allowed or None, "bad_words": sorted(words), "min_tokens": min_tokens}
    async with connect(world) as client:
        response = await client.post(path, json=body | fields | {"max_tokens": 3, "ignore_eos": ignore_eos})
    can_end = allows_end and (min_tokens == 0 or ignore_eos)
    is_possible = not allowed or can_end or bool(letters - words)
    assert response.status_code == (200 if is_possible else 400), response.text
    if not is_possible:
        assert response.json()["error"]["param"] == "allowed_token_ids"
        assert "no token is left" in response.json()["error"]["message"]


async def test_stop_tokens_may_not_be_the_whole_vocabulary_where_the_text_must_go_on(client) -> None:
    fields = {"stop_token_ids": list(range(330))}
    assert (await client.post("/v1/completions", json=COMPLETION | fields)).status_code == 200
    response = await client.post("/v1/completions", json=COMPLETION | fields | {"min_tokens": 1})
    assert response.status_code == 400
    assert "no token is left" in response.json()["error"]["message"]
