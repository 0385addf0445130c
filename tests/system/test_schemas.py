"""Answers by JSON Schemas of many kinds, from a model that says anything: each parses and is valid."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema_rs
import pytest

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.grammar import JSON_BLANKS, GrammarSpec
from engine.grammar_compiler import GrammarCompiler, GrammarError
from engine.ipc.messages import ModelInfo
from engine.types import Request, SamplingParams
from server.text.tokenizer import Tokenizer
from tests.support.schemas import ENDLESS, REFUSED, SCHEMAS
from tests.support.server_process import save_tiny_model

MAX_TOKENS = 400
CALENDAR = re.compile("-02-29|:60")  # of a year that need not be a leap year, a minute that had no leap second


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, ModelInfo]:
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_model(Path(path))
    config = {
        "model": {"path": str(path)},
        "device": {"num_threads": 1, "kernels": "torch"},
        "kv_cache": {"memory": "40000tokens"},
        "scheduler": {"max_num_seqs": 64},
        "speculation": {"method": "ngram", "depth": 3},
    }
    return build_engine(EngineConfig.model_validate(config), lambda phase, detail: None)


def answers(built: tuple[Engine, ModelInfo], spec: GrammarSpec, number: int) -> list[tuple[str, str]]:
    """The texts of answers at temperature 1, and why each ended."""
    engine, model = built
    tokenizer = Tokenizer(model.tokenizer)
    eos = model.eos_token_ids
    for seed in range(number):
        params = SamplingParams(seed=seed, max_tokens=MAX_TOKENS, temperature=1.0, grammar=spec, stop_token_ids=eos)
        engine.add(Request(request_id=str(seed), prompt_token_ids=[10 + seed % 200, 7], params=params))
    tokens: dict[str, list[int]] = {str(seed): [] for seed in range(number)}
    ended = []
    while engine.has_work:
        for output in engine.step()[0]:
            assert output.error is None
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                text = [token for token in tokens.pop(output.request_id) if token not in eos]
                ended.append((tokenizer.decode(text), output.finish_reason))
    assert tokens == {}
    return ended


def check(built: tuple[Engine, ModelInfo], name: str, number: int) -> None:
    schema = SCHEMAS[name]
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    for blanks in (None, JSON_BLANKS):
        num_complete = 0
        spec = GrammarSpec("json_schema", json.dumps(schema), blanks)
        for text, reason in answers(built, spec, number):
            if reason == "length":  # it was cut
                continue
            value = json.loads(text)
            assert validator.is_valid(value) or CALENDAR.search(text), text
            assert (
                list(value) == sorted(value, key=list(schema["properties"]).index) if "properties" in schema else True
            )
            num_complete += 1
        assert name in ENDLESS or num_complete >= 0.5 * number


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_parse_and_are_valid(built: tuple[Engine, ModelInfo], name: str) -> None:
    check(built, name, 6)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_thousand_answers_parse_and_are_valid(built: tuple[Engine, ModelInfo], name: str) -> None:
    check(built, name, 1000)


def test_literals_that_spell_a_special_token_are_spelled_in_text(built: tuple[Engine, ModelInfo]) -> None:
    """No client says by a literal which tokens its text is made of."""
    added = json.loads(built[1].tokenizer.tokenizer_json)["added_tokens"]
    special = next(token["content"] for token in added if token["special"])
    schemas = [
        {"const": special},
        {"const": f"a{special}b"},
        {"enum": [f"Stop at {special} now", f"Stop at {special}"]},
        {"type": "object", "properties": {special: {"type": "null"}}, "required": [special]},
        {"type": "string", "pattern": f"^x{re.escape(special)}y$"},
    ]
    specs = [GrammarSpec("json_schema", json.dumps(schema), None) for schema in schemas]
    specs += [GrammarSpec("regex", f"x{re.escape(special)}y"), GrammarSpec("lark", f"start: {json.dumps(special)}")]
    for spec in specs:
        for text, reason in answers(built, spec, 3):
            assert reason == "stop"
            assert special in text


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused(built: tuple[Engine, ModelInfo], name: str) -> None:
    _, model = built
    compiler = GrammarCompiler(
        model.tokenizer.tokenizer_json, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids
    )
    schema, _ = REFUSED[name]
    with pytest.raises(GrammarError):
        compiler.compile(GrammarSpec("json_schema", json.dumps({"type": "object", "properties": {"a": schema}})))
