"""Free text with tags, as a grammar: which texts follow it, by the library that the engine uses."""

from __future__ import annotations

import json
from functools import cache

import pytest

from engine.grammar import GrammarSpec
from engine.grammar_compiler import GrammarCompiler
from server.structured.structural_tags import Tag, triggered_tags
from server.structured.tag_formats import tag_grammar
from tests.support.fake_engine import make_assets, make_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
ARGUMENTS = GrammarSpec(
    "json_schema",
    json.dumps(SCHEMA),
)
TAGS = [
    Tag("<fn=weather>", ARGUMENTS, "</fn>"),
    Tag("<fn=add>", GrammarSpec("regex", r"\d+\+\d+/é"), "</fn>"),
    Tag("[now]", None, ""),
]
TRIGGERS = ["<fn=", "[now]"]
CALL, ADD = '<fn=weather>{"city": "Ulm"}</fn>', "<fn=add>1+22/é</fn>"


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(make_assets().tokenizer_json, vocab_size=330, eos_token_ids=[1])


def verdict(spec: GrammarSpec, text: str) -> str:
    """Of a text as the whole answer: it is "complete", it is "open" (must go on), or "broken"."""
    matcher = compiler().compile(spec)
    token_ids = make_tokenizer().encode(text, add_special_tokens=False)
    if matcher.try_consume_tokens(token_ids) < len(token_ids):
        return "broken"
    return "complete" if matcher.is_accepting() else "open"


TEXTS = [
    "",
    "hello",
    CALL,
    f"so: {CALL} and {ADD}",
    ADD + CALL,
    "[now]",
    "<fn",
    "<fn=",
    "<fn=other>",
    "<fn=add>x",
    CALL[:-1],
]
VERDICTS = {
    "": "complete complete complete complete complete complete complete open broken broken open",
    "at_least_one": "open open complete complete complete complete open open broken broken open",
    "stop_after_first": "complete complete complete broken broken complete complete open broken broken open",
    "at_least_one stop_after_first": "open open complete broken broken complete open open broken broken open",
    "no text": "complete broken complete broken complete complete open open broken broken open",
    "no text at_least_one": "open broken complete broken complete complete open open broken broken open",
}


@pytest.mark.parametrize("options", VERDICTS)
def test_text_is_free_up_to_a_trigger(options: str) -> None:
    spec = triggered_tags(
        TAGS,
        TRIGGERS,
        at_least_one="at_least_one" in options,
        stop_after_first="stop_after_first" in options,
        has_text="no text" not in options,
    )
    assert [verdict(spec, text) for text in TEXTS] == VERDICTS[options].split()


def test_special_tokens_begin_and_end_tags_and_are_no_text() -> None:
    special = make_tokenizer().special_texts
    assert special == {"<s>", "</s>", "<|im_start|>", "<|im_end|>"}
    tags = [Tag("<|im_start|>call", ARGUMENTS, "<|im_end|>")]
    spec = triggered_tags(tags, ["<|im_start|>"], special_tokens=special)
    assert verdict(spec, 'hi <|im_start|>call{"city":"x"}<|im_end|> bye') == "complete"
    assert verdict(spec, "<|im_start|>x") == "broken"
    assert verdict(spec, "<|im_end|>") == "broken"


def test_old_and_new_tags_of_vllm_s_clients_mean_the_same() -> None:
    old = {"structures": [{"begin": "<fn=weather>", "schema": SCHEMA, "end": "</fn>"}], "triggers": ["<fn="]}
    content = {"type": "json_schema", "json_schema": SCHEMA}
    tag = {"type": "tag", "begin": "<fn=weather>", "content": content, "end": "</fn>"}
    new = {"format": {"type": "triggered_tags", "triggers": ["<fn="], "tags": [tag]}}
    for text in TEXTS:
        verdicts = {verdict(tag_grammar(given, (), blanks="[ ]{1,2}"), text) for given in (old, new)}
        assert len(verdicts) == 1, (text, verdicts)


def test_formats_are_put_together() -> None:
    letters = {"type": "tag", "begin": "(", "content": {"type": "grammar", "grammar": 'start: "a"+'}, "end": ")"}
    alternatives = [
        {"type": "const_string", "value": "none"},
        {"type": "regex", "pattern": "[0-9]{2}"},
        {"type": "tags_with_separator", "separator": ";", "at_least_one": True, "tags": [letters]},
    ]
    thinking = {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"}
    form = {"type": "sequence", "elements": [thinking, {"type": "or", "elements": alternatives}]}
    spec = tag_grammar({"type": "structural_tag", "format": form}, (), blanks=None)
    verdicts = {
        "a <b> c</think>none": "complete",
        "</think>42": "complete",
        "</think>(aa);(a)": "complete",
        "</think>": "open",
        "x": "open",
        "</think>(b)": "broken",
        "</think>42;": "broken",
        "</think>x": "broken",
    }
    assert {text: verdict(spec, f"<think>{text}") for text in verdicts} == verdicts


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (5, "an object with format"),
        ({"format": {"type": "unknown"}}, "format.type must be one of const_string"),
        ({"format": {"type": "sequence", "elements": []}}, "format.elements must not be empty"),
        ({"format": {"type": "sequence", "elements": [5]}}, r"format.elements\[0\] must be an object"),
        ({"format": {"type": "tag", "begin": "a", "end": "b"}}, "format.content must be an object"),
        (
            {"format": {"type": "triggered_tags", "triggers": ["x"], "tags": [{"begin": "y"}]}},
            "no trigger begins format.tags",
        ),
        ({"structures": [{"begin": "a", "schema": {}, "end": ""}]}, "triggers must be a list"),
        ({"structures": [{"begin": "a", "schema": {}, "end": ""}], "triggers": ["b"]}, "no trigger begins the tag 'a'"),
        ({"structures": [{"begin": "a", "schema": 5, "end": ""}], "triggers": ["a"]}, "schema must be a JSON Schema"),
        ({"structures": [], "triggers": ["a"]}, "at least one tag"),
    ],
)
def test_what_is_wrong_with_a_tag_is_said(given: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tag_grammar(given, (), blanks=None)


def test_formats_that_are_nested_without_end_are_refused() -> None:
    form: dict[str, object] = {"type": "any_text"}
    for _ in range(100):
        form = {"type": "sequence", "elements": [form]}
    with pytest.raises(ValueError, match="more than 32 deep"):
        tag_grammar({"format": form}, (), blanks=None)
