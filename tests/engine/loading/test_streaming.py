"""Weights stream from a file into their final layout: one matrix at a time is floats, and the model never."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Format
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM

from engine.config import EngineConfig, ModelConfig
from engine.loading.loader import load_model, read_model_facts
from engine.models.llama import Llama
from engine.models.model_error import ModelError
from engine.models.registry import build_model
from engine.planning.engine_plan import MemoryPlan, plan_memory
from engine.planning.machine import read_machine
from engine.quantization.linear import KeptMatrix, LinearMethods, exchange_linears
from engine.quantization.method import COMPILED_FORMATS, FORMATS, make_methods
from engine.runner.kernel_backend import KernelBackend
from kernels.numba.packing.packing import PackedMatrix
from tests.support import gguf_files

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
METHODS = {
    **{f"torch {name}": (FORMATS, name) for name in FORMATS},
    **{f"compiled {name}": (COMPILED_FORMATS, name) for name in COMPILED_FORMATS},
}


@pytest.fixture(autouse=True)
def _reproducible(one_thread_and_seed: None) -> None:
    """Every test begins with the same seed."""


@pytest.fixture(params=METHODS)
def methods(request: pytest.FixtureRequest) -> LinearMethods:
    formats, name = METHODS[request.param]
    return make_methods(formats, name)


def checkpoint(config: PreTrainedConfig) -> dict[str, Tensor]:
    kind = Qwen2ForCausalLM if isinstance(config, Qwen2Config) else LlamaForCausalLM
    weights = kind(config).state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def build(config: PreTrainedConfig, methods: LinearMethods, dtype: torch.dtype = torch.float32) -> Llama:
    model = build_model(config, dtype=dtype, methods=methods)
    assert isinstance(model, Llama)
    return model


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen2Config(**SIZES, tie_word_embeddings=True)])
def test_a_streamed_model_is_the_one_that_is_built_whole_and_packed(
    config: PreTrainedConfig, methods: LinearMethods
) -> None:
    weights = checkpoint(config)
    streamed, whole = build(config, methods), build(config, LinearMethods())
    streamed.load_weights(weights.items())
    whole.load_weights(weights.items())
    exchange_linears(whole, methods)
    expected = dict(whole.named_modules())
    for name, module in streamed.named_modules():
        if isinstance(module, KeptMatrix):
            assert module.describe() == expected[name].describe(), name
            assert torch.equal(module.dense(), expected[name].dense()), name
    parameters = dict(whole.named_parameters())
    assert parameters.keys() == dict(streamed.named_parameters()).keys()
    assert all(torch.equal(p, parameters[name]) for name, p in streamed.named_parameters())


def test_no_more_than_one_matrix_is_floats(methods: LinearMethods) -> None:
    config = LlamaConfig(**SIZES)
    model, alive, most = build(config, methods), [], 0

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for name, weight in checkpoint(config).items():
            tensor = weight.clone()
            alive.append(weakref.ref(tensor))
            sizes = [seen.nbytes for seen in (reference() for reference in alive) if seen is not None]
            most = max(most, sum(sizes))
            yield name, tensor
            del tensor, weight

    model.load_weights(stream())
    largest = max(320 * 64, 2 * 96 * 64) * 4
    assert most <= largest + 2 * 64 * 4  # norms come between
    gc.collect()
    assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize(("dtype", "is_tied"), [(torch.bfloat16, True), (torch.float16, False)])
def test_embeddings_keep_the_files_16_bits_where_those_are_read(dtype: torch.dtype, is_tied: bool) -> None:
    config = LlamaConfig(**SIZES, tie_word_embeddings=is_tied)
    weights = {name: weight.to(dtype) for name, weight in checkpoint(config).items()}
    for keeps_tables in (True, False):
        model = build(config, make_methods(COMPILED_FORMATS, "fp16", keeps_tables=keeps_tables))
        model.load_weights(weights.items())
        rows = model.embedding_rows(torch.arange(320))
        assert torch.equal(rows.to(dtype), weights["model.embed_tokens.weight"])
        is_shared = keeps_tables and is_tied
        assert model.embed_tokens.weight.numel() == (0 if is_shared else 320 * 64), "one copy does for both"
        assert is_shared or model.embed_tokens.weight.dtype == (dtype if keeps_tables else torch.float32)
        output = weights["model.embed_tokens.weight" if is_tied else "lm_head.weight"]
        assert torch.equal(model.lm_head.dense(), output.float())
    narrow = build(config, make_methods(COMPILED_FORMATS, "none", keeps_tables=True), torch.bfloat16)
    narrow.load_weights((name, weight.float()) for name, weight in weights.items())
    assert narrow.embed_tokens.weight.dtype == torch.bfloat16, "of wider numbers, the model's dtype is all it takes"


def test_a_load_that_raises_says_what_is_wrong_and_leaves_nothing_behind(
    tmp_path: Path, methods: LinearMethods
) -> None:
    state = gguf_files.state_of(gguf_files.make_model("llama", tied=False))
    key = "model.layers.1.self_attn.k_proj.weight"
    bias = key.replace("weight", "bias")
    problems = {
        "missing": ({name: weight for name, weight in state.items() if name != key}, f"1 missing .*{key}"),
        "unknown": ({**state, bias: torch.zeros(len(state[key]))}, f"1 not part of the model .*{bias}"),
    }
    num_threads, num_before = torch.get_num_threads(), num_matrices()
    for name, (weights, error) in problems.items():
        path = gguf_files.write_gguf(tmp_path / f"{name}.gguf", "llama", weights, Format.Q8_0)
        with pytest.raises(ModelError, match=error):
            load_model(ModelConfig(path=str(path)), dtype=torch.float32, seed=0, methods=methods)
    for bad in (state[key][:, :32], state[key][:32], state[key][0]):
        model = build(gguf_files.CONFIGS["llama"], methods)
        with pytest.raises(ValueError, match=rf"{key} has shape .* asks for \[64, 64\]"):
            model.load_weights({**state, key: bad}.items())
        del model
    assert num_matrices() == num_before
    assert torch.get_num_threads() == num_threads


def num_matrices() -> int:
    gc.collect()
    return sum(issubclass(type(found), KeptMatrix | PackedMatrix) for found in gc.get_objects())


def plan_of(path: Path, **settings: str) -> MemoryPlan:
    config = EngineConfig.model_validate({"model": {"path": str(path), **settings}, "device": {"name": "cpu"}})
    return plan_memory(read_model_facts(config.model), config, read_machine())


@pytest.mark.parametrize("quantization", COMPILED_FORMATS)
@pytest.mark.parametrize("format", [Format.Q4_0, Format.Q4_1, Format.Q8_0, Format.F16, Format.BF16, Format.F32])
@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_knows_what_the_matrices_of_a_file_take(
    tmp_path: Path, quantization: str, format: Format, tied: bool
) -> None:
    model = gguf_files.make_model("llama", tied=tied)
    path = gguf_files.write_gguf(tmp_path / "m.gguf", "llama", gguf_files.state_of(model), format)
    plan = plan_of(path, quantization=quantization)
    back_end = KernelBackend(plan, is_strict=False)
    loaded = load_model(plan.model_config, dtype=plan.dtype, seed=0, methods=back_end.linear_methods).model
    packed = [module.weight for module in loaded.modules() if isinstance(module, KeptMatrix)]
    assert sum(matrix.num_bytes for matrix in packed) == plan.linear_bytes
    assert sum(parameter.nbytes for parameter in loaded.parameters()) <= plan.embedding_bytes
