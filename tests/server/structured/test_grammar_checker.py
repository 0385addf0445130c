"""Hostile grammars: a 400 in bounded time and memory, while others are compiled, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import pytest

from engine.grammar import GrammarSpec
from server.errors import ApiError
from server.structured.grammar_checker import GrammarChecker, GrammarLimits
from tests.support.fake_engine import make_assets, make_model

MODEL = make_model(make_assets(), 330)
FINE = GrammarSpec("regex", "[0-9]+")


def _schema(schema: object) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(schema))


def _nested(depth: int, key: str) -> str:
    return f'{{"{key}":' * depth + "{}" + "}" * depth


def _tower(levels: int) -> dict[str, object]:
    """Each definition has two of the next: 2^levels in all, if they are written out."""
    definitions = {
        f"d{i}": {
            "type": "object",
            "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}, "b": {"$ref": f"#/$defs/d{i + 1}"}},
        }
        for i in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{levels}": {"type": "string", "maxLength": 5}}}


HOSTILE = {
    "nested not": GrammarSpec("json_schema", _nested(20_000, "not")),
    "nested properties": GrammarSpec("json_schema", '{"properties":{"a":' * 5000 + "{}" + "}}" * 5000),
    "nested allOf": GrammarSpec("json_schema", '{"allOf":[' * 5000 + "{}" + "]}" * 5000),
    "a tower": _schema(_tower(40)),
    "all of many unions": _schema({"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": 99 - i}]} for i in range(24)]}),
    "a huge enum": _schema({"enum": [f"value {i} of many" for i in range(30_000)]}),
    "many properties": _schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(20_000)}}),
    "long strings": _schema({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "many items": _schema({"type": "array", "items": {"type": "string"}, "minItems": 10**7, "maxItems": 10**8}),
    "a cycle": _schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    "repetitions": GrammarSpec("regex", "((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}"),
    "states": GrammarSpec("regex", "(a|b)*a(a|b){5000}"),
    "nested groups": GrammarSpec("regex", "(" * 100_000 + "a" + ")" * 100_000),
    "nested lark": GrammarSpec("lark", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "left recursion": GrammarSpec("lark", "start: start start | start start start | "),
    "intersections": GrammarSpec("lark", "start: T\nT: " + " & ".join(f"/(.*{i}.*){{{i}}}/" for i in range(1, 40))),
    "gbnf": GrammarSpec("lark", "root ::= " + "(" * 50_000),
    "many rules": GrammarSpec("lark", "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(20_000))),
    "surrogates": GrammarSpec("regex", "\ud800"),
    "no text": GrammarSpec("regex", ""),
    "zeros": GrammarSpec("lark", "\0" * 1000),
}


@pytest.fixture(scope="module")
def checker():
    found = GrammarChecker(GrammarLimits(max_seconds=0.5, max_memory_bytes=256 << 20))
    yield found
    found.close()


@pytest.mark.parametrize("kind", HOSTILE)
async def test_whatever_is_sent_is_compiled_or_refused_and_the_next_is_served(checker, kind: str) -> None:
    """The engine compiles what is let through, so that must be quick."""
    found = await asyncio.gather(checker.check(HOSTILE[kind], MODEL, param="guided_json"), return_exceptions=True)
    if not isinstance(found[0], GrammarSpec):
        error = found[0]
        assert isinstance(error, ApiError)
        assert error.status == 400
        assert error.message.startswith("guided_json: ")
        assert len(error.message) < 1500
    checked = checker._known.get(HOSTILE[kind])
    assert checked is None or checked.spec is None or checked.seconds < 3.0
    assert await checker.check(FINE, MODEL, param="guided_regex") == FINE


async def test_what_is_too_large_is_refused_with_the_numbers_before_it_is_looked_at(checker) -> None:
    large = GrammarSpec("json_schema", json.dumps({"enum": ["x" * (10 << 20)]}))
    start = time.monotonic()
    with pytest.raises(ApiError, match=r"\d{8} bytes are more than the 1048576 that limits.max_grammar_bytes"):
        await checker.check(large, MODEL, param="guided_json")
    assert time.monotonic() - start < 30


async def test_one_that_takes_all_its_time_holds_nobody_else_up(checker) -> None:
    endless = asyncio.ensure_future(checker.check(HOSTILE["intersections"], MODEL, param="guided_grammar"))
    for i in range(5):
        spec = GrammarSpec("regex", f"[0-9]{{{i}}}")
        assert await checker.check(spec, MODEL, param="guided_regex") == spec
    await asyncio.gather(endless, return_exceptions=True)


async def test_equal_grammars_are_compiled_once_and_counted() -> None:
    seen: list[tuple[str, bool]] = []
    checker = GrammarChecker(on_checked=lambda outcome, seconds: seen.append((outcome, seconds is not None)))
    try:
        await asyncio.gather(*(checker.check(FINE, MODEL, param="guided_regex") for _ in range(20)))
        await checker.check(FINE, MODEL, param="guided_regex")
        for _ in range(2):
            with pytest.raises(ApiError):
                await checker.check(GrammarSpec("regex", "("), MODEL, param="guided_regex")
    finally:
        checker.close()
    assert sorted(seen) == [("cached", False)] * 20 + [("compiled", True), ("refused", False), ("refused", True)]


async def test_a_client_that_leaves_takes_the_grammar_from_nobody(checker) -> None:
    spec = GrammarSpec("regex", "leaves[0-9]+")
    first = asyncio.ensure_future(checker.check(spec, MODEL, param="guided_regex"))
    second = asyncio.ensure_future(checker.check(spec, MODEL, param="guided_regex"))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == spec


async def test_a_process_that_somebody_kills_is_replaced(checker) -> None:
    for i in range(3):
        spec = GrammarSpec("regex", f"kill{i}[0-9]+")
        assert await checker.check(spec, MODEL, param="guided_regex") == spec
        for process in list(checker._workers.processes):
            os.kill(process.pid, signal.SIGKILL)


async def test_more_grammars_than_wait_at_once_are_asked_to_come_again(checker) -> None:
    specs = [GrammarSpec("regex", f"flood{i}[0-9]+") for i in range(80)]
    found = await asyncio.gather(
        *(checker.check(spec, MODEL, param="guided_regex") for spec in specs), return_exceptions=True
    )
    refused = [one for one in found if isinstance(one, ApiError)]
    assert len(refused) == 80 - 64
    assert {one.status for one in refused} == {429}
