"""Grammars of answers: what they let a model write is what the parser reads, in every family's format."""

from __future__ import annotations

import json
import random
from functools import cache

import jsonschema_rs
import pytest

from engine.grammar import GrammarSpec
from engine.grammar_compiler import GrammarCompiler
from server.parsing.answer_format import AnswerFormat, markers_of
from server.parsing.answer_grammar import Tokens, Wanted, answer_grammar
from server.parsing.answer_shape import AnswerShape
from server.parsing.callable_tools import CallableTool, CallableTools
from server.text.tokenizer import Tokenizer
from tests.support.tool_world import assets_with
from tests.support.written_answers import ANSWERS, FORMATS, collected, parse

SPECIAL = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "<|tool_call|>", "<|/tool_call|>", "<|channel|>", "<|message|>",
    "<|start|>", "<|end|>", "<|call|>", "<|constrain|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>",
    "<channel|>",
)  # fmt: skip
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
EOS = 1
SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
    "note": {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "bc"]}, "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["kind", "tags"],
        "additionalProperties": False,
    },
}  # fmt: skip
formats = pytest.mark.parametrize("style", sorted(FORMATS))


@cache
def tokenizer(is_special: bool) -> Tokenizer:
    return Tokenizer(assets_with(None, SPECIAL if is_special else (), ADDED if is_special else ()))


@cache
def compiler(is_special: bool) -> GrammarCompiler:
    assets = assets_with(None, SPECIAL if is_special else (), ADDED if is_special else ())
    return GrammarCompiler(
        assets.tokenizer_json, vocab_size=330 + is_special * len(SPECIAL + ADDED), eos_token_ids=[EOS]
    )


def tools(*, must_call: bool = True, is_strict: bool = True, is_parallel: bool = True) -> CallableTools:
    given = [CallableTool(name, schema, is_strict, i) for i, (name, schema) in enumerate(SCHEMAS.items())]
    return CallableTools(tuple(given), must_call, is_parallel)


def grammar_of(answer_format: AnswerFormat, wanted: Wanted, *, is_special: bool) -> GrammarSpec | None:
    own = tokenizer(is_special)
    return answer_grammar(answer_format, wanted, Tokens(added=own.added_tokens, special=own.special_texts, ends=[EOS]))


@cache
def words(is_special: bool) -> tuple[list[int], frozenset[int]]:
    """The tokens that are whole characters, and those of them that something ends or begins with."""
    own, found, marks = tokenizer(is_special), [], set()
    for token_id in range(330 + is_special * len(SPECIAL + ADDED)):
        text = own.token_bytes(token_id).decode(errors="replace")
        if text and "\ufffd" not in text:
            found.append(token_id)
            if text[0] in '"}]</\n,0' or token_id in own.special_ids:
                marks.add(token_id)
    return found, frozenset(marks)


def write(spec: GrammarSpec, style: str, rng: random.Random, *, is_special: bool, most: int = 250) -> list[int] | None:
    """What a model without any sense would write under the grammar, which knows but the format's markers; None where it
    does not come to an end."""
    matcher, written = compiler(is_special).compile(spec), []
    candidates, marks = words(is_special)
    markers = [tokenizer(is_special).encode(text, add_special_tokens=False) for text in markers_of(FORMATS[style])]
    markers = [marker for marker in markers if len(marker) > 1]
    for _ in range(most):
        if matcher.is_stopped():
            return written
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if mask >> EOS & 1 and rng.random() < 0.7:
            return written
        marker = rng.choice(markers) if markers and rng.random() < 0.15 else []
        if marker and matcher.validate_tokens(marker) == len(marker):
            matcher.consume_tokens(marker)
            written += marker
            continue
        allowed = [token_id for token_id in candidates if mask >> token_id & 1]
        allowed = allowed or [token_id for token_id in range(mask.bit_length()) if mask >> token_id & 1]
        ending = [token_id for token_id in allowed if token_id in marks]
        token_id = rng.choice(ending if ending and rng.random() < 0.6 else allowed)
        if token_id == EOS:
            return written
        assert matcher.consume_token(token_id), matcher.get_error()
        written.append(token_id)
    return None


def read(style: str, token_ids: list[int], *, is_special: bool, is_thinking: bool = False):
    """What the parser makes of it, with special tokens hidden as a server does."""
    own = tokenizer(is_special)
    shape = AnswerShape(
        answer_format=FORMATS[style],
        tools=tools().kinds,
        is_thinking=is_thinking,
        hidden_tokens=sorted(own.special_texts),
    )
    data, pieces = b"", []
    for token_id in token_ids:
        if token_id in own.special_ids:
            text = data.decode()
            pieces.append((text, [(len(text), own.token_text(token_id))]))
            data = b""
        else:
            data += own.token_bytes(token_id)
    pieces.append((data.decode(errors="replace"), []))
    return collected(parse(shape.make_parser(holds_calls=True), pieces))


def is_valid(style: str, name: str, arguments: str) -> bool:
    if style == "gemma" and name == "note":
        return json.loads(arguments).keys() >= {"kind", "tags"}
    return jsonschema_rs.validator_for(SCHEMAS[name]).is_valid(json.loads(arguments))


@formats
@pytest.mark.parametrize("is_special", [False, True])
def test_a_call_that_must_come_comes_and_follows_its_schema(style: str, is_special: bool) -> None:
    if FORMATS[style].is_harmony and not is_special:
        return
    spec = grammar_of(FORMATS[style], Wanted(tools=tools()), is_special=is_special)
    num_calls = 0
    for seed in range(8):
        written = write(spec, style, random.Random(seed), is_special=is_special)
        if written is None:
            continue
        answer = read(style, written, is_special=is_special)
        text = tokenizer(is_special).decode(written, skip_special_tokens=False)
        assert answer.tool_calls, text
        assert answer.content == "", text
        for call in answer.tool_calls:
            num_calls += 1
            assert call.is_whole
            assert is_valid(style, call.name, call.arguments), text
    assert num_calls


@formats
def test_free_text_becomes_a_call_only_as_one_that_fits(style: str) -> None:
    spec = grammar_of(FORMATS[style], Wanted(tools=tools(must_call=False)), is_special=True)
    num_texts = 0
    for seed in range(8):
        written = write(spec, style, random.Random(seed), is_special=True)
        if written is None:
            continue
        num_texts += 1
        for call in read(style, written, is_special=True).tool_calls:
            assert call.is_whole
            assert is_valid(style, call.name, call.arguments)
    assert num_texts > 2


def accepts(spec: GrammarSpec, text: str, *, is_special: bool) -> bool:
    matcher = compiler(is_special).compile(spec)
    ids = tokenizer(is_special).encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and (matcher.is_accepting() or matcher.is_stopped())


@pytest.mark.parametrize("is_special", [False, True])
def test_what_models_write_is_let_through(is_special: bool) -> None:
    """In the forms that templates show; a parser takes more."""
    known = {"weather", "now"}
    num = 0
    for written in ANSWERS:
        is_known = {name for name, _ in written.calls} <= known
        answer_format = FORMATS[written.style]
        if not is_known or written.is_thinking or (answer_format.is_harmony and not is_special) or written.ids:
            continue
        spec = grammar_of(answer_format, Wanted(tools=tools(must_call=False)), is_special=is_special)
        num += accepts(spec, written.text.rstrip(), is_special=is_special)
    assert num >= 14


def test_text_is_free_until_it_begins_a_call() -> None:
    spec = grammar_of(FORMATS["hermes"], Wanted(tools=tools(must_call=False)), is_special=False)
    for text in ("", "Hello.", "1 < 2 and <tool", "<think>\nso\n</think>\n\nHello."):
        assert accepts(spec, text, is_special=False), text
    for text in (
        "<tool_call>\noops",
        '<tool_call>\n{"name": "other"',
        '<tool_call>\n{"name": "weather", "arguments": {"town',
    ):
        assert not accepts(spec, text, is_special=False), text


def test_one_call_is_all_where_calls_are_not_parallel() -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for must_call in (False, True):
        wanted = Wanted(tools=tools(must_call=must_call, is_parallel=False))
        spec = grammar_of(FORMATS["hermes"], wanted, is_special=False)
        assert accepts(spec, call, is_special=False)
        assert not accepts(spec, f"{call}\n{call}", is_special=False)


@pytest.mark.parametrize("style", ["hermes", "mistral args", "glm", "gemma", "harmony"])
@pytest.mark.parametrize("budget", [0, 1, 9])
def test_reasoning_is_ended_at_its_budget(style: str, budget: int) -> None:
    """By the one token that ends it, wherever the thoughts are; and an answer may follow."""
    if FORMATS[style].is_harmony:
        opened, closed = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
    else:
        reasoning = FORMATS[style].reasoning
        opened, closed = reasoning.open.strip(), reasoning.close.strip()
    spec = grammar_of(FORMATS[style], Wanted(budget=budget), is_special=True)
    for length in (0, budget, budget + 1):
        text = opened + "x" * length + closed + "Four."
        assert accepts(spec, text, is_special=True) == (length <= budget), length


def test_a_prompt_that_has_opened_the_reasoning_begins_inside() -> None:
    spec = grammar_of(FORMATS["deepseek"], Wanted(budget=3, is_thinking=True), is_special=True)
    assert accepts(spec, "xyz</think>\n\nFour.", is_special=True)
    assert not accepts(spec, "Four, I think.", is_special=True)
    assert accepts(spec, "</think>Four.", is_special=True)


def test_a_demanded_call_comes_behind_reasoning_and_a_structured_answer_too() -> None:
    thought = "so\n</think>\n\n"
    wanted = Wanted(tools=tools(), is_thinking=True)
    spec = grammar_of(FORMATS["hermes"], wanted, is_special=True)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert accepts(spec, thought + call, is_special=True)
    assert not accepts(spec, thought + "No.", is_special=True)
    content = GrammarSpec("json_schema", '{"type": "object"}')
    spec = grammar_of(FORMATS["hermes"], Wanted(content=content, is_thinking=True), is_special=True)
    assert accepts(spec, thought + "{}", is_special=True)
    assert not accepts(spec, thought + "No.", is_special=True)
    both = Wanted(content=content, tools=tools(must_call=False))
    spec = grammar_of(FORMATS["hermes"], both, is_special=True)
    assert accepts(spec, "{}", is_special=True)
    assert accepts(spec, call, is_special=True)
    assert not accepts(spec, "No.", is_special=True)


def test_without_anything_to_follow_there_is_no_grammar() -> None:
    for style in FORMATS:
        assert grammar_of(FORMATS[style], Wanted(), is_special=True) is None
    content = GrammarSpec("json_schema", '{"type": "object"}')
    assert grammar_of(FORMATS["llama"], Wanted(content=content), is_special=True) == content
