"""Models with experts: the names that checkpoints have for them, what is known of their sizes, and what they cost."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from engine.config import EngineConfig, ModelConfig
from engine.loading.loader import load_model, read_model_facts
from engine.models.moe import Gate
from engine.models.registry import build_model
from engine.models.transformers_fallback import TransformersModel
from engine.planning.engine_plan import plan_memory, render_plan
from engine.planning.machine import read_machine
from engine.quantization.linear import exchange_linears
from engine.quantization.method import FORMATS, make_methods
from engine.scheduling.step_stats import ModelCost, count_work
from engine.types import Request, SamplingParams, Scheduled, Sequence

HIDDEN, EXPERT, NUM_EXPERTS, TOP_K = 32, 24, 5, 2
SIZES = {
    "vocab_size": 300,
    "hidden_size": HIDDEN,
    "intermediate_size": EXPERT,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}
OWN_EXPERTS = {**EXPERTS, "moe_intermediate_size": EXPERT}
QWEN2_MOE = Qwen2MoeConfig(**SIZES, **OWN_EXPERTS, shared_expert_intermediate_size=40, mlp_only_layers=[1])
MIXTRAL = MixtralConfig(**SIZES, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)
CONFIGS = {
    "mixtral": MIXTRAL,
    "qwen2-moe": QWEN2_MOE,
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **OWN_EXPERTS),
    "olmoe": OlmoeConfig(**SIZES, **EXPERTS),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def checkpoint(config: PreTrainedConfig, path: Path, *, stacked: bool) -> dict[str, Tensor]:
    """What transformers writes: experts one by one as they were published, or stacked as it keeps them."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    model.save_pretrained(path, save_original_format=not stacked)
    return load_file(path / "model.safetensors")


def directory(config: PreTrainedConfig, path: Path) -> ModelConfig:
    """A directory with nothing but a config."""
    own = copy.deepcopy(config)
    own.architectures = ["TinyForCausalLM"]
    own.save_pretrained(path)
    return ModelConfig(path=str(path), load_format="dummy", implementation="own")


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_are_loaded_one_by_one_and_stacked(name: str, tmp_path: Path) -> None:
    config, loaded = CONFIGS[name], []
    for stacked in (False, True):
        torch.manual_seed(0)
        weights = checkpoint(config, tmp_path, stacked=stacked)
        assert any(key.endswith(".mlp.experts.gate_up_proj") for key in weights) == stacked
        model = build_model(config, dtype=torch.float32, implementation="own")
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        model.load_weights(weights.items())
        loaded.append(dict(model.named_parameters()))
    assert loaded[0].keys() == loaded[1].keys()
    assert all(torch.equal(loaded[0][key], loaded[1][key]) for key in loaded[0])


def test_what_is_wrong_with_experts_is_named(tmp_path: Path) -> None:
    weights = checkpoint(MIXTRAL, tmp_path, stacked=False)
    model = build_model(MIXTRAL, dtype=torch.float32)
    up = "model.layers.1.block_sparse_moe.experts.4.w3.weight"
    with pytest.raises(ValueError, match=r"1 missing \(model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight\)"):
        model.load_weights((key, weight) for key, weight in weights.items() if key != up)
    with pytest.raises(ValueError, match=r"experts\.4\.up_proj\.weight has shape \[3, 2\], but .* \[24, 32\]"):
        model.load_weights({**weights, up: torch.zeros(3, 2)}.items())
    seventh = "model.layers.1.block_sparse_moe.experts.7.w3.weight"
    with pytest.raises(ValueError, match="1 not part of the model"):
        model.load_weights({**weights, seventh: weights[up]}.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_facts_tell_all_parameters_from_those_that_a_token_goes_through(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    facts = read_model_facts(directory(config, tmp_path))
    num_layers = 2 if name == "qwen2-moe" else 3
    assert facts.num_parameters == AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters()
    assert facts.experts.num_parameters == num_layers * NUM_EXPERTS * 3 * HIDDEN * EXPERT
    assert facts.experts.share == TOP_K / NUM_EXPERTS
    assert facts.widest >= TOP_K * (HIDDEN + EXPERT)


def test_a_model_without_experts_has_no_facts_of_them(tmp_path: Path) -> None:
    assert read_model_facts(directory(LlamaConfig(**SIZES), tmp_path)).experts.num_parameters == 0


def test_a_plan_names_the_bytes_of_experts_apart(tmp_path: Path) -> None:
    model = directory(QWEN2_MOE, tmp_path)
    config = EngineConfig(model=model.model_copy(update={"dtype": "float32", "quantization": "int8"}))
    plan = plan_memory(read_model_facts(model), config, read_machine())
    assert plan.expert_bytes == 2 * NUM_EXPERTS * 3 * HIDDEN * EXPERT * 4
    assert "\nexperts " in render_plan(plan)
    others = plan.facts.num_parameters - plan.facts.num_linear_parameters - plan.facts.experts.num_parameters
    assert plan.embedding_bytes - plan.expert_bytes == others * 4


@pytest.mark.parametrize("name", CONFIGS)
def test_random_weights_need_nothing_but_a_config(name: str, tmp_path: Path) -> None:
    loaded = load_model(directory(CONFIGS[name], tmp_path), dtype=torch.float32, seed=0)
    matrices = [parameter for key, parameter in loaded.model.named_parameters() if ".experts." in key]
    assert matrices
    for matrix in matrices:
        assert matrix.std().item() == pytest.approx(matrix.shape[-1] ** -0.5, rel=0.1)


def test_a_format_of_linear_layers_leaves_gates_and_experts_exact() -> None:
    model = build_model(QWEN2_MOE, dtype=torch.float32)
    for parameter in model.parameters():  # made of memory as it was, in which any bits may lie
        parameter.data.normal_()
    num_linears = 3 * 2 + 2 + 2 * 2 + 1  # attention, the plain MLP, the shared experts, the output
    assert len(exchange_linears(model, make_methods(FORMATS, "int8"))) == num_linears
    assert len([module for module in model.modules() if isinstance(module, Gate)]) == 4
    assert {parameter.dtype for key, parameter in model.named_parameters() if ".mlp." in key} == {torch.float32}


def test_a_step_reads_the_experts_that_its_tokens_are_likely_to_choose() -> None:
    cost = ModelCost(
        weight_bytes=10,
        flops_per_token=1,
        kv_bytes_per_token=0,
        attention_flops_per_pair=0,
        expert_bytes=1000,
        expert_share=0.25,
    )
    request = Request(request_id="r", prompt_token_ids=[1] * 90, params=SamplingParams(seed=0, max_tokens=1))
    batches = {n: [Scheduled(Sequence(request, [1] * 90), n, 0, samples=False, num_scored=0)] for n in (1, 2, 90)}
    assert {n: cost.bytes_moved(count_work(batch)) for n, batch in batches.items()} == {1: 260, 2: 447, 90: 1009}
    assert cost.bytes_moved(count_work([])) == 0


def test_what_our_own_experts_do_not_do_is_left_to_transformers() -> None:
    clipped = OlmoeConfig(**SIZES, **EXPERTS, clip_qkv=4.0)
    with torch.device("meta"):
        assert isinstance(build_model(clipped, dtype=torch.bfloat16), TransformersModel)
        with pytest.raises(ValueError, match="clip_qkv"):
            build_model(clipped, dtype=torch.float32, implementation="own")
        with pytest.raises(ValueError, match="num_experts_per_tok is 9, but there are 5 experts"):
            build_model(OlmoeConfig(**SIZES, num_experts=5, num_experts_per_tok=9), dtype=torch.float32)
