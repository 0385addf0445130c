"""The context that a config's rope scaling gives: served by default, or where it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, Olmo3Config, PreTrainedConfig, Qwen2Config

from engine.config import EngineConfig, ModelConfig
from engine.loading.loader import read_model_facts
from engine.loading.notes import length_notes
from engine.planning.engine_plan import MemoryPlan, plan_memory, render_plan
from engine.planning.machine import read_machine
from tests.support import model_cases

SIZES = {key: value for key, value in model_cases.SIZES.items() if key != "max_position_embeddings"}
QWEN_RECIPE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}  # as its model card has it


def plan(directory: Path, **settings: object) -> MemoryPlan:
    model = {"path": str(directory), "load_format": "dummy", **settings}
    config = EngineConfig.model_validate({"model": model, "scheduler": {"max_num_seqs": 1}})
    return plan_memory(read_model_facts(config.model), config, read_machine())


def save(config: PreTrainedConfig, directory: Path, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict() | changes))
    return directory


def scaled(kind: str, factor: float, **more: object) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 10000.0, "factor": factor, **more}


def test_the_recipe_of_qwen_serves_four_times_its_positions(tmp_path: Path) -> None:
    fields = Qwen2Config(**SIZES, max_position_embeddings=32768).to_dict()
    del fields["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(fields | {"rope_theta": 1e6, "rope_scaling": QWEN_RECIPE}))
    assert plan(tmp_path).max_model_len == 131_072
    with pytest.raises(ValueError, match="trained for 131072 tokens and answers nonsense beyond"):
        plan(tmp_path, max_model_len=131_073)


@pytest.mark.parametrize(
    ("positions", "rope", "served", "longest"),
    [
        (4096, scaled("yarn", 8.0, original_max_position_embeddings=4096), 32768, 32768),
        (32768, scaled("yarn", 8.0, original_max_position_embeddings=4096), 32768, 32768),  # counted already
        (4096, scaled("linear", 4.0), 4096, 16384),
        (4096, scaled("dynamic", 2.0), 4096, 8192),
        (4096, scaled("linear", 1.0), 4096, 4096),
        (4096, {"rope_type": "default", "rope_theta": 10000.0}, 4096, 4096),
        (8192, model_cases.LLAMA3, 8192, 8192),
    ],
)
def test_scalings_lengthen_what_is_served_or_what_may_be_asked_for(
    positions: int, rope: dict[str, object], served: int, longest: int, tmp_path: Path
) -> None:
    save(LlamaConfig(**SIZES, max_position_embeddings=positions, rope_parameters=rope), tmp_path)
    assert plan(tmp_path).max_model_len == served
    assert plan(tmp_path, max_model_len=longest).max_model_len == longest
    with pytest.raises(ValueError, match=f"set it to {longest} or less"):
        plan(tmp_path, max_model_len=longest + 1)


def test_a_rotation_of_some_layers_counts_too(tmp_path: Path) -> None:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": scaled("yarn", 8.0, original_max_position_embeddings=64),
    }
    config = Olmo3Config(**SIZES, max_position_embeddings=64, rope_parameters=rope, sliding_window=16)
    assert plan(save(config, tmp_path)).max_model_len == 512


def test_beyond_the_original_length_the_logits_are_those_of_transformers(tmp_path: Path) -> None:
    rope = scaled("yarn", 4.0, original_max_position_embeddings=16)
    config = Qwen2Config(**SIZES, max_position_embeddings=16, rope_parameters=rope)
    model_cases.assert_same_logits(model_cases.Case(config, lengths=(60, 33)), tmp_path, "own")


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_so_they_are_at_a_length_that_was_asked_for(kind: str, tmp_path: Path) -> None:
    config = Qwen2Config(**SIZES, max_position_embeddings=16, rope_parameters=scaled(kind, 4.0))
    case = model_cases.Case(config, lengths=(60, 60), max_model_len=60)  # dynamic is held at the longest text served
    model_cases.assert_same_logits(case, tmp_path, "own")


def test_learned_positions_are_not_stretched(tmp_path: Path) -> None:
    facts = read_model_facts(ModelConfig(path=str(save(model_cases.FALLBACK["gpt-2"].config, tmp_path))))
    assert facts.trained_context == facts.longest_context == 64


def test_rotations_that_follow_the_longest_text_served_are_said_once(tmp_path: Path) -> None:
    rope = scaled("dynamic", 4.0)
    save(LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=rope), tmp_path)
    long, short = (plan(tmp_path, max_model_len=length) for length in (128, 64))
    assert length_notes(short.facts, short.max_model_len) == []
    assert "rotated as one of 128 tokens" in render_plan(long)
    save(model_cases.OWN["phi3 longrope, long"].config, tmp_path)
    assert "rotated as one of 64 tokens" in render_plan(plan(tmp_path))
