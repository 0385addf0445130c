"""A model that was loaded but cannot answer never says that it is ready."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM, PreTrainedModel

from engine.batch.step_inputs import StepInputs
from engine.build import build_engine
from engine.config import EngineConfig
from engine.models.model_error import ModelError
from engine.runner.executor import StepResult
from engine.runner.step_builder import StepBuilder
from engine.runner.trial import try_one_token

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


class FailingHead:
    """An executor whose layers work and whose head asks for what is not there."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, inputs: StepInputs) -> StepResult:
        raise self.error


def build(model: PreTrainedModel, directory: Path, phases: list[str], **settings: str) -> None:
    model.save_pretrained(directory)
    Tokenizer(tokenizer_models.WordLevel({"a": 0}, unk_token="a")).save(str(directory / "tokenizer.json"))
    config = {"model": {"path": str(directory), **settings}, "device": {"num_threads": 1}}
    build_engine(EngineConfig.model_validate(config), lambda phase, _: phases.append(phase))


def test_a_start_computes_one_token(tmp_path: Path) -> None:
    phases: list[str] = []
    build(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path, phases)
    assert "trial" in phases


@pytest.mark.parametrize("kind", [(LlamaForCausalLM, LlamaConfig), (Olmo2ForCausalLM, Olmo2Config)])
@pytest.mark.parametrize("place", ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight"])
def test_weights_that_give_no_numbers_end_the_start(
    kind: tuple[type[PreTrainedModel], type], place: str, tmp_path: Path
) -> None:
    model = kind[0](kind[1](**SIZES))
    with torch.no_grad():
        model.get_parameter(place).fill_(torch.nan)
    with pytest.raises(ModelError, match="are not finite numbers"):
        build(model, tmp_path, [])


@pytest.mark.parametrize("error", [AttributeError("no image_hidden_states"), TypeError("x"), RuntimeError("shapes")])
def test_whatever_a_head_raises_is_a_sentence_about_the_model(error: Exception) -> None:
    with pytest.raises(ModelError, match=rf"some/model was loaded.*{error}"):
        try_one_token(FailingHead(error), StepBuilder(16, 48), path="some/model", dtype=torch.float32)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_is_no_fault_of_the_model(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        try_one_token(FailingHead(error), StepBuilder(16, 48), path="m", dtype=torch.float32)
    assert raised.value is error
