"""Checkpoints whose files hold numbers that no model has: a sentence, before anything is built from them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from engine.build import build_engine
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.loading.gguf.header import read_gguf_header
from engine.loading.loader import load_model, read_model_facts
from engine.models.model_error import ModelError
from engine.types import Request, SamplingParams
from tests.support import gguf_files

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama with yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS),
    "gemma 3": Gemma3TextConfig(**SIZES, sliding_window=16),
    "gpt-2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
FLOATS = [("f", float("nan")), ("f", float("inf")), ("f", -1.0), ("f", 1e38), ("f", 0.0)]
ABSURD: list[object] = [-16, -1, 0, 10**6, 10**18, 10**400, 1e308, float("nan"), float("inf"), -0.5, "7", [], {}, True]
DEEP = ["[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, '{"model_type": "llama", "b": ' + "[" * 50_000 + "}"]
UNUSED = {"chunk_size_feed_forward", "label2id", "id2label", "initializer_range"}
Place = tuple[str | int, ...]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


def numbers(content: object, place: Place = ()) -> Iterator[Place]:
    """Where the numbers of a JSON document are."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from numbers(value, (*place, key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from numbers(value, (*place, index))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield place


def replaced(content: object, place: Place, value: object) -> object:
    if not place:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)  # type: ignore[call-overload]
    copy[place[0]] = replaced(copy[place[0]], place[1:], value)
    return copy


def answer(engine: Engine) -> None:
    params = SamplingParams(seed=0, max_tokens=3)
    engine.add(Request(request_id="r", prompt_token_ids=[5, 6, 7], params=params))
    while engine.has_work:
        assert all(output.error is None for output in engine.step()[0])


def start(path: Path) -> Engine:
    model = {"path": str(path), "load_format": "dummy"}
    settings = {"model": model, "device": {"num_threads": 1}, "kv_cache": {"memory": "256tokens"}}
    return build_engine(EngineConfig.model_validate(settings), lambda phase, detail: None)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_absurd_number_is_a_sentence_or_a_model_that_answers(name: str, tmp_path: Path) -> None:
    fields = {key: value for key, value in CONFIGS[name].to_dict().items() if key not in UNUSED}
    mutations = [(place, value) for place in numbers(fields) for value in ABSURD]
    rng = random.Random(name)
    for place, value in mutations:
        (tmp_path / "config.json").write_text(json.dumps(replaced(fields, place, value)))
        try:
            facts = read_model_facts(ModelConfig(path=str(tmp_path), load_format="dummy"))
        except ModelError as error:
            assert str(error).count("\n") == 0, (place, value)  # noqa: PT017  # which of many it is about
            continue
        if facts.num_parameters < 10**6 and rng.random() < 0.1:
            try:
                engine = start(tmp_path)
            except ValueError as error:
                assert getattr(error, "kind", "") in ("model", "memory", "config"), (place, value)  # noqa: PT017
                continue
            answer(engine)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2"])
def test_each_absurd_number_of_a_gguf_header_is_a_sentence_or_a_model(family: str, tmp_path: Path) -> None:
    model = gguf_files.make_model(family, tied=True)
    path = gguf_files.write_gguf(tmp_path / "model.gguf", family, gguf_files.state_of(model))
    whole = path.read_bytes()
    header = read_gguf_header(path)
    places = [(whole.index(name.encode()) + len(name), value) for name, value in header.metadata.items()]
    places = [(place, value) for place, value in places if type(value) in (int, float)]
    assert len(places) > 8
    for place, original in places:
        for kind, value in [("i", -16), ("I", 0), ("I", 1), ("I", 7), ("I", 10**6), ("I", 2**32 - 1), *FLOATS]:
            code = {"I": 4, "i": 5, "f": 6}[kind]
            changed = struct.pack(f"<I{kind}", code, value)
            path.write_bytes(whole[:place] + changed + whole[place + len(changed) :])
            try:
                loaded = load_model(ModelConfig(path=str(path)), dtype=torch.float32, seed=0)
            except ModelError:
                continue
            assert loaded.vocab_size == 320, (original, value)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [7, 1000, 10**5, 10**6, 10**18, -16])
def test_sizes_that_the_weights_do_not_have_are_noticed_before_memory_is_planned(
    field: str, value: int, tmp_path: Path
) -> None:
    LlamaForCausalLM(CONFIGS["llama"]).save_pretrained(tmp_path)
    fields = CONFIGS["llama"].to_dict()
    if (field, value) == ("num_hidden_layers", 7) or value != fields[field]:
        (tmp_path / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(ModelError, match=field if field == "num_hidden_layers" else "asks for|must be"):
        read_model_facts(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("field", ["vocab_size", "n_embd", "n_layer"])
def test_the_same_holds_for_families_on_layers_of_transformers(field: str, tmp_path: Path) -> None:
    GPT2LMHeadModel(CONFIGS["gpt-2"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt-2"].to_dict() | {field: 600}))
    with pytest.raises(ModelError):
        read_model_facts(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("text", DEEP)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer_config.json"]
)
def test_nesting_without_end_is_a_sentence(name: str, text: str, tmp_path: Path) -> None:
    LlamaForCausalLM(CONFIGS["llama"]).save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError):
        load_model(ModelConfig(path=str(tmp_path)), dtype=torch.float32, seed=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("top_p", 0.0), ("top_p", 2.0), ("top_k", -16), ("min_p", 3), ("repetition_penalty", 0.0)],
)
def test_sampling_defaults_that_nothing_can_be_sampled_with_are_named(name: str, value: float, tmp_path: Path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, name: value}))
    with pytest.raises(ModelError, match=rf"generation_config\.json.*{name}"):
        load_model(ModelConfig(path=str(tmp_path), load_format="dummy"), dtype=torch.float32, seed=0)


@pytest.mark.parametrize("value", [-1, 10**18, "x", [], [10**18, "x"], {"a": 1}, 1.5, True])
def test_ends_that_are_no_tokens_are_no_ends(value: object, tmp_path: Path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    try:
        loaded = load_model(ModelConfig(path=str(tmp_path), load_format="dummy"), dtype=torch.float32, seed=0)
    except ModelError:
        return
    assert all(0 <= token_id < 300 for token_id in loaded.eos_token_ids)
