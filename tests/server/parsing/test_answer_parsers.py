"""Parsers of answers: what every family's format means, however the text is cut, and with special tokens hidden."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.written_answers import (
    ANSWERS,
    FORMATS,
    Written,
    collected,
    cut,
    make_parser,
    parse,
    special_tokens_of,
    split_specials,
)

every_answer = pytest.mark.parametrize("written", ANSWERS, ids=lambda one: f"{one.style}: {one.text[:40]!r}")


def meaning(written: Written) -> tuple[str, str, list[tuple[str, object]]]:
    return written.content, written.reasoning, [*written.calls]


@every_answer
@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("is_hidden", [False, True])
def test_an_answer_means_the_same_at_every_cut(written: Written, holds: bool, is_hidden: bool) -> None:
    tokens = special_tokens_of(written.text) if is_hidden else []
    text, specials = split_specials(written.text, tokens)
    options = {"hidden": tokens, "holds": holds, "is_thinking": written.is_thinking}
    whole = parse(make_parser(written.style, **options), [(text, specials)])
    answer = collected(whole)
    calls = [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]
    assert (answer.content, answer.reasoning, calls) == meaning(written)
    assert all(call.is_whole for call in answer.tool_calls)
    for place in range(len(text) + 1):
        assert parse(make_parser(written.style, **options), cut(text, specials, [place])) == whole
    assert parse(make_parser(written.style, **options), cut(text, specials, range(len(text)))) == whole


@every_answer
def test_ids_that_a_model_writes_are_kept(written: Written) -> None:
    answer = collected(parse(make_parser(written.style), [(written.text, [])]))
    for call, wanted in zip(answer.tool_calls, written.ids, strict=False):
        assert call.call_id == wanted or not wanted
    assert len({call.call_id for call in answer.tool_calls}) == len(answer.tool_calls)


FRAGMENTS = st.sampled_from(
    [part for written in ANSWERS for part in (written.text[: len(written.text) // 2], written.text[3:], written.text)]
    + ['{"name": "', '"arguments": {', "}", "<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "\n"]
)
TEXTS = st.lists(st.one_of(FRAGMENTS, st.text(max_size=8)), max_size=6).map("".join)


@given(style=st.sampled_from(sorted(FORMATS)), text=TEXTS, cuts=st.lists(st.integers(0, 300), max_size=6),
       holds=st.booleans(), is_cut=st.booleans(), is_hidden=st.booleans())  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_any_text_means_the_same_at_any_cuts(
    style: str, text: str, cuts: list[int], holds: bool, is_cut: bool, is_hidden: bool
) -> None:
    """And never raises. Arguments that are whole are an object."""
    tokens = special_tokens_of(text) if is_hidden else []
    text, specials = split_specials(text, tokens)
    places = [place for place in cuts if place <= len(text)]
    whole = parse(make_parser(style, hidden=tokens, holds=holds), [(text, specials)], is_cut=is_cut)
    assert parse(make_parser(style, hidden=tokens, holds=holds), cut(text, specials, places), is_cut=is_cut) == whole
    for call in collected(whole).tool_calls:
        assert not call.is_whole or isinstance(json.loads(call.arguments), dict)
        assert call.is_whole or is_cut or not holds


@given(style=st.sampled_from(sorted(set(FORMATS) - {"harmony", "granite"})), text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_text_without_markers_is_content_as_it_is(style: str, text: str) -> None:
    if any(mark in text for mark in "<[{") or "functools" in text:
        return
    answer = collected(parse(make_parser(style), [(text, [])]))
    assert (answer.content, answer.reasoning, answer.tool_calls) == (text, "", [])


MALFORMED = {
    "hermes": [
        "<tool_call>not json</tool_call>",
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": }}</tool_call>',
        '<tool_call>{"name": "no name!", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": "\\x"}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"city": "Par',
        '<tool_call>{"name": "now", "arguments": ' + '{"a": ' * 100 + "</tool_call>",
        "<tool_call>",
        "<tool_call>\n\n",
    ],
    "mistral args": ["[TOOL_CALLS]now[ARGS]nothing", "[TOOL_CALLS]" + "x" * 500, "[TOOL_CALLS]a b[ARGS]{}"],
    "deepseek": [
        "<｜tool▁calls▁begin｜>oops",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n[]",
    ],
    "qwen coder": [
        "<tool_call>\n<function=now>\nwhat?",
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        "<tool_call>\n<function=note>\n<parameter=>\nx\n</parameter>\n</function>\n</tool_call>",
    ],
    "gemma": ["<|tool_call>call:now[]<tool_call|>", "<|tool_call>call:now{a:}<tool_call|>"],
    "harmony": ["<|channel|>commentary to=functions.now<|message|>not json"],
}


@pytest.mark.parametrize(("style", "text"), [(style, text) for style, texts in MALFORMED.items() for text in texts])
def test_what_looks_like_a_call_and_is_none_is_content(style: str, text: str) -> None:
    answer = collected(parse(make_parser(style, holds=True), [(f"Well. {text}", [])]))
    if style == "harmony":
        answer = collected(parse(make_parser(style, holds=True), [(text, [])]))
    assert answer.tool_calls == []
    assert answer.content.rstrip().endswith(text.rstrip())


@pytest.mark.parametrize(("style", "text"), [(style, text) for style, texts in MALFORMED.items() for text in texts])
def test_a_call_that_was_told_of_too_early_loses_nothing(style: str, text: str) -> None:
    """What it said of its arguments is the beginning of JSON, and the rest of the text is content."""
    answer = collected(parse(make_parser(style), [(text, [])]))
    told = "".join(call.arguments for call in answer.tool_calls)
    assert len(answer.tool_calls) <= 1
    assert all(not call.is_whole for call in answer.tool_calls)
    if answer.tool_calls and style in ("hermes", "mistral args", "deepseek"):
        assert text.endswith(told + answer.content)


@pytest.mark.parametrize("holds", [False, True])
def test_a_call_after_one_that_was_none_is_found(holds: bool) -> None:
    text = '<tool_call>oops <tool_call>{"name": "now", "arguments": {}}</tool_call>'
    answer = collected(parse(make_parser("hermes", holds=holds), [(text, [])]))
    assert answer.content == "<tool_call>oops"
    assert [call.name for call in answer.tool_calls] == ["now"]


def test_a_call_that_the_length_cuts_stays_a_call() -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Par'
    for holds in (False, True):
        answer = collected(parse(make_parser("hermes", holds=holds), [(text, [])], is_cut=True))
        assert [(call.name, call.arguments, call.is_whole) for call in answer.tool_calls] == [
            ("weather", '{"city": "Par', False)
        ]
        assert answer.content == ""


def test_arguments_come_while_they_are_written() -> None:
    parser = make_parser("hermes")
    parser.feed('<tool_call>{"name": "note", "arguments": {"text": "')
    (delta,) = parser.feed("a long text")
    assert (delta.index, delta.text) == (0, "a long text")


def test_without_tools_what_looks_like_a_call_is_content() -> None:
    for written in ANSWERS:
        if written.calls and written.style != "harmony":
            parser = make_parser(written.style, calls=False, is_thinking=written.is_thinking)
            answer = collected(parse(parser, [(written.text, [])]))
            assert answer.tool_calls == []
            assert written.calls[0][0] in answer.content


def test_text_that_only_looks_like_a_special_token_begins_no_call() -> None:
    text = "The token [TOOL_CALLS] begins a call, as in [TOOL_CALLS]now[ARGS]{}, and [THINK] a thought."
    answer = collected(parse(make_parser("mistral args", hidden=["[TOOL_CALLS]", "[ARGS]", "[THINK]"]), [(text, [])]))
    assert (answer.content, answer.tool_calls) == (text, [])


ALMOST = {
    "hermes": [
        "<tool_call>",
        "<tool_cal",
        "<tool_call>{",
        '<tool_call>{"name": "now", "arguments": {',
        "<think>",
        "\n",
    ],
    "llama": ["{", '{"name"', "<|python_tag|>{"],
    "mistral list": ["[TOOL_CALLS] [", "[TOOL_CALLS"],
    "mistral args": ["[TOOL_CALLS]now", "[TOOL_CALLS]now[ARGS]", "[THINK]"],
    "deepseek": ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n"],
    "qwen coder": ["<tool_call>\n<function=now>\n<parameter=a>\n", "<tool_call>\n<function="],
    "gemma": ["<|tool_call>call:now{", '<|tool_call>call:now{a:<|"|>', "<|tool_call>call:now{a:1,"],
    "harmony": [
        "<|channel|>",
        "<|start|>assistant<|channel|>analysis<|message|>",
        "<|channel|>commentary to=functions.now<|message|>{",
    ],
}


@pytest.mark.parametrize(("style", "text"), [(style, text) for style, texts in ALMOST.items() for text in texts])
@pytest.mark.parametrize("step", [1, 7, 10**6])
def test_almost_calls_cost_what_other_text_costs(style: str, text: str, step: int) -> None:
    """Counted in characters that were looked at: four times the text costs four times as much, not sixteen times."""

    def cost(num: int) -> int:
        parser = make_parser(style)
        whole = text * num
        for begin in range(0, len(whole), step):
            parser.feed(whole[begin : begin + step])
        parser.finish()
        return parser.num_scanned

    few, many = cost(40), cost(160)
    assert many <= 5 * few + 2000
    assert many <= 400 * 160 * len(text)
