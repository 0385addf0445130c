"""An engine with compiled layers: the same tokens as torch's, and the same bits whatever else is computed with them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.ipc.messages import ModelInfo
from engine.kv_cache import layer_spec
from engine.loading.loader import read_model_facts
from engine.models.llama_numba import NumbaLlama
from engine.planning.engine_plan import MemoryPlan, plan_memory
from engine.planning.machine import read_machine
from engine.planning.resolve import SettingError
from engine.quantization.method import COMPILED_FORMATS
from engine.types import Request, SamplingParams, Scheduled
from tests.support.answers import answer_all

VOCAB_SIZE = 150
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]),
    "mistral": MistralConfig(**SIZES, sliding_window=20, architectures=["MistralForCausalLM"]),
    "qwen2": Qwen2Config(**SIZES, architectures=["Qwen2ForCausalLM"]),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, architectures=["Qwen3ForCausalLM"]),
    "mixed windows": Qwen2Config(
        **{**SIZES, "num_hidden_layers": 4},
        use_sliding_window=True,
        sliding_window=20,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        architectures=["Qwen2ForCausalLM"],
    ),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2, architectures=["SmolLM3ForCausalLM"]),
}
Section = dict[str, object]


@pytest.fixture
def save(tmp_path: Path):
    """Writes a directory with nothing but a config; the weights are random."""

    def write(config: PreTrainedConfig) -> Path:
        config.save_pretrained(tmp_path)
        return tmp_path

    return write


def make_config(path: Path, **sections: Section) -> EngineConfig:
    model = {"path": str(path), "load_format": "dummy"} | sections.pop("model", {})
    device = {"name": "cpu", "kernels": "numba", "num_threads": 1} | sections.pop("device", {})
    return EngineConfig.model_validate({"model": model, "device": device, **sections})


def build(path: Path, **sections: Section) -> tuple[Engine, ModelInfo]:
    return build_engine(make_config(path, **sections), lambda phase, detail: None)


def make_requests(*, greedy: bool = False) -> list[Request]:
    rng = random.Random(1)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(37)]
    requests = []
    for i in range(12):
        tail = [rng.randrange(5) for _ in range(rng.randint(1, 60))]  # with repetition, for n-grams
        params = SamplingParams(
            seed=i,
            max_tokens=14,
            temperature=0.0 if greedy or i % 2 else 0.8,
            logprobs=2,
            prompt_logprobs=1 if i % 4 == 0 else None,
        )
        prompt = shared + tail if i % 3 == 0 else tail
        requests.append(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    return requests


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_torch(name: str, save) -> None:
    path, exact = save(MODELS[name]), {"dtype": "float32", "quantization": "none"}
    ours, model = build(path, model=exact)
    assert isinstance(ours.executor.runner.model, NumbaLlama)
    assert model.settings["device.kernels"].value == "numba"
    theirs, _ = build(path, model=exact, device={"kernels": "torch"})
    assert not isinstance(theirs.executor.runner.model, NumbaLlama)
    answered, expected = (answer_all(engine, make_requests(greedy=True)) for engine in (ours, theirs))
    assert answered.tokens == expected.tokens
    assert len({tuple(tokens) for tokens in answered.tokens.values()}) > 6  # they say different things
    for request_id, (_, logprobs, _) in answered.answers.items():
        for a, b in zip(logprobs, expected.answers[request_id][1], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


ARITHMETICS: dict[str, dict[str, Section]] = {
    **{name: {"model": {"quantization": name}} for name in ("auto", *COMPILED_FORMATS)},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "int8 by 8 bits": {"model": {"quantization": "int8", "activations": "int8"}},
    "int4 by 8 bits": {"model": {"quantization": "int4", "activations": "int8"}},
    "a cache of int8": {"kv_cache": {"dtype": "int8"}},
}


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("name", ["llama", "mistral", "mixed windows"])
def test_a_request_is_the_same_to_the_last_bit_whatever_happens(name: str, arithmetic: str, save) -> None:
    path = save(MODELS[name])
    sections = {"model": {}, "kv_cache": {}} | ARITHMETICS[arithmetic]
    requests = make_requests()
    engine, _ = build(path, **sections | {"kv_cache": sections["kv_cache"] | {"prefix_caching": False}})
    alone = {}
    for request in requests:
        alone |= answer_all(engine, [request]).answers
    warm, _ = build(path, **sections, device={"num_threads": 2})
    assert answer_all(warm, requests, at_once=2).answers == alone
    assert answer_all(warm, requests, at_once=5).answers == alone
    assert warm.scheduler.num_prefix_hits > 0
    chunked, _ = build(path, **sections, scheduler={"max_num_seqs": 6, "max_num_batched_tokens": 23})
    assert answer_all(chunked, requests).answers == alone
    drafting, _ = build(path, **sections, speculation={"method": "ngram", "depth": 3, "ngram_min": 1})
    assert answer_all(drafting, requests, at_once=3).answers == alone
    few_rows, _ = build(path, **sections, speculation={"method": "ngram", "depth": 3, "ngram_min": 1})
    few_rows.scheduler.limits = replace(few_rows.scheduler.limits, max_num_seqs=5, max_num_logits=9)
    assert answer_all(few_rows, requests).answers == alone


def test_a_cache_of_int8_holds_twice_the_tokens_in_the_memory_that_the_plan_says(save) -> None:
    path = save(MODELS["qwen3"])  # heads of 32
    sizes = {}
    for dtype in ("float16", "int8"):
        config = make_config(path, kv_cache={"dtype": dtype, "memory": "1MB"})
        made, engine = plan(config), build_engine(config, lambda phase, detail: None)[0]
        blocks = engine.executor.runner.kv_cache.blocks
        assert blocks.shape == (made.num_blocks + 1, made.block_size * made.kv_bytes_per_token)
        assert 0.99e6 < made.num_blocks * blocks.shape[1] <= 1e6
        sizes[dtype] = made.num_kv_tokens
        assert all(len(tokens) == 14 for tokens in answer_all(engine, make_requests()).tokens.values())
    assert sizes["int8"] / sizes["float16"] == pytest.approx(2 * 32 / (32 + 4), rel=0.01)


def test_a_cache_of_int8_is_read_by_torch_s_layers_too(save) -> None:
    """By compiled attention and by torch's: the same tokens, but where a key that lies between two codes tips one."""
    path, exact = save(MODELS["llama"]), {"dtype": "float32", "quantization": "none"}
    found = []
    for device in ({}, {"kernels": "torch"}):
        engine, model = build(path, model=exact, device=device, kv_cache={"dtype": "int8"})
        assert model.settings["kv_cache.dtype"].value == "int8"
        assert engine.executor.runner.kv_cache.dtype == torch.int8
        found.append(answer_all(engine, make_requests(greedy=True)).tokens)
    same = [found[0][request_id] == tokens for request_id, tokens in found[1].items()]
    assert sum(same) >= len(same) - 1


def test_layers_with_a_window_keep_that_of_a_text_and_change_no_bit(save, monkeypatch) -> None:
    """Three of four layers see 20 tokens; a text of 220 then takes about half of the memory."""
    path, scheduler = save(MODELS["mixed windows"]), {"max_num_batched_tokens": 32}
    requests = [longer(request, 200) for request in make_requests()[:4]]

    def answer() -> tuple[dict[str, object], int]:
        engine, _ = build(path, scheduler=scheduler)
        kv, cache = engine.scheduler.kv, engine.executor.runner.kv_cache
        most = 0

        def note(batch: list[Scheduled]) -> None:
            nonlocal most
            most = max(most, kv.pool.num_owned * cache.blocks.shape[1])

        engine.on_batch = note
        return answer_all(engine, requests).answers, most

    in_groups, held = answer()
    monkeypatch.setattr(layer_spec, "MAX_GROUPS", 1)
    in_one, held_by_all = answer()
    assert in_groups == in_one
    assert held < 0.6 * held_by_all


@pytest.mark.parametrize(("name", "kept"), [("llama", "auto"), ("smollm3", "auto"), ("llama", "int8")])
def test_a_request_is_the_same_after_preemption(name: str, kept: str, save) -> None:
    path = save(MODELS[name])
    requests = [longer(request) for request in make_requests()]
    expected = answer_all(build(path, kv_cache={"dtype": kept})[0], requests, at_once=1).answers
    tight, _ = build(path, model={"max_model_len": 160}, kv_cache={"memory": "208tokens", "dtype": kept})
    assert answer_all(tight, requests).answers == expected
    assert tight.scheduler.num_preemptions > 0


def longer(request: Request, max_tokens: int = 120) -> Request:
    """One whose answer outgrows the room that is kept free for it."""
    params = msgspec.structs.replace(request.params, max_tokens=max_tokens)
    return msgspec.structs.replace(request, prompt_token_ids=request.prompt_token_ids[-12:], params=params)


def test_the_default_keeps_weights_and_cache_in_half_precision(save) -> None:
    engine, model = build(save(MODELS["llama"]))
    settings = {key: setting.value for key, setting in model.settings.items()}
    assert settings["model.dtype"] == "float32"
    assert settings["model.quantization"] == "fp16"
    assert settings["kv_cache.dtype"] == "float16"
    assert engine.executor.runner.kv_cache.codec.keys_as_columns


def test_bfloat16_rounds_what_meets_weights_and_the_cache_keeps_more_bits(save) -> None:
    path = save(MODELS["llama"])
    fingerprints = []
    for dtype in ("float32", "bfloat16"):
        _, model = build(path, model={"dtype": dtype}, kv_cache={"dtype": "float16"})
        settings = {key: setting.value for key, setting in model.settings.items()}
        assert (settings["model.dtype"], settings["model.quantization"]) == (dtype, "none")
        assert {kept for formats in model.weights.values() for kept in formats} == {dtype}
        fingerprints.append(model.fingerprint)
    _, auto = build(path, model={"dtype": "bfloat16"})
    assert auto.settings["kv_cache.dtype"].value == "float16"
    assert auto.fingerprint == fingerprints[1] != fingerprints[0]


def test_activations_of_8_bits_are_for_compiled_layers_and_change_the_fingerprint(save) -> None:
    path = save(MODELS["llama"])
    notes: list[str] = []
    config = make_config(path, model={"quantization": "int8", "activations": "int8"})
    _, narrow = build_engine(config, lambda phase, detail: notes.append(detail) if phase == "note" else None)
    assert "lossy" in notes[0]
    found = [build(path, model={"quantization": "int8"})[1], narrow]
    assert found[0].fingerprint != found[1].fingerprint
    kept = [{name for formats in model.weights.values() for name in formats} for model in found]
    assert kept == [{"int8", "float32"}, {"int8, by activations of 8 bits", "float32"}]
    with pytest.raises(SettingError, match=r"only compiled CPU layers have, but device\.kernels is torch"):
        build(path, model={"activations": "int8"}, device={"kernels": "torch"})


def plan(config: EngineConfig) -> MemoryPlan:
    return plan_memory(read_model_facts(config.model), config, replace(read_machine(), device="cpu", gpu=None))


NOT_COMPILED = {
    "head size 8": (LlamaConfig(**SIZES, head_dim=8), {}, "head size 8"),
    "hidden size 72": (LlamaConfig(**{**SIZES, "hidden_size": 72}, head_dim=16), {}, "hidden size 72"),
    "intermediate size 100": (LlamaConfig(**{**SIZES, "intermediate_size": 100}), {}, "intermediate size 100"),
    "a family without layers of ours": (
        GPT2Config(vocab_size=VOCAB_SIZE, n_embd=64, n_layer=1, n_head=4, n_positions=64),
        {},
        "another kind than Llama's",
    ),
    "layers of transformers": (
        MODELS["llama"],
        {"model": {"implementation": "transformers"}},
        "another kind than Llama's",
    ),
}


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_what_cannot_be_compiled_runs_on_torch_and_says_why(name: str, save) -> None:
    model, sections, reason = NOT_COMPILED[name]
    path = save(model)
    made = plan(make_config(path, **sections, device={"kernels": "auto"}))
    setting = made.settings["device.kernels"]
    assert (made.kernels, setting.value) == ("torch", "torch")
    assert reason in setting.reason
    with pytest.raises(SettingError, match=reason) as refused:
        plan(make_config(path, **sections))
    assert refused.value.kind == "config"
    assert '"auto" or "torch"' in str(refused.value)


@pytest.mark.parametrize("name", MODELS)
def test_what_can_be_compiled_is(name: str, save) -> None:
    made = plan(make_config(save(MODELS[name]), device={"kernels": "auto"}))
    assert (made.kernels, made.settings["device.kernels"].source) == ("numba", "default")


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_model_that_falls_back_to_torch_is_served(num_threads: int, save) -> None:
    device = {"kernels": "auto", "num_threads": num_threads}
    not_compiled = LlamaConfig(**{**SIZES, "intermediate_size": 100})
    engine, model = build(save(not_compiled), device=device, kv_cache={"block_size": 8})
    assert model.settings["device.kernels"].value == "torch"
    assert not engine.executor.runner.kv_cache.codec.keys_as_columns
    assert all(len(tokens) == 14 for tokens in answer_all(engine, make_requests()).tokens.values())
