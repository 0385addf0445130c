"""Configs that are read without transformers' classes say the same as with them, or are left to them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from engine.loading.plain_config import read_plain_config
from engine.models.architecture import read_architecture
from engine.models.registry import build_model

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": [7, 9],
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=24),
    "llama 3": LlamaConfig(**SIZES | {"rope_parameters": LLAMA3}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral with windows": MistralConfig(**SIZES, sliding_window=32),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=24),
}


def write(directory: Path, fields: dict[str, object]) -> Path:
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def old_style(config: PreTrainedConfig) -> dict[str, object]:
    """As releases before 5 wrote it."""
    fields = config.to_dict()
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    fields.pop("layer_types", None)
    return fields


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_plain_config_says_what_transformers_reads(name: str, is_old: bool, tmp_path: Path) -> None:
    config = CONFIGS[name]
    directory = write(tmp_path, old_style(config) if is_old else config.to_dict())
    plain, theirs = read_plain_config(directory), AutoConfig.from_pretrained(directory)
    assert plain is not None
    for max_model_len in (None, 64):
        options = {"dtype": torch.float32, "max_model_len": max_model_len}
        assert read_architecture(plain, **options) == read_architecture(theirs, **options)
    for field in ("model_type", "architectures", "eos_token_id", "name_or_path", "is_encoder_decoder"):
        assert getattr(plain, field) == getattr(theirs, field)
    with torch.device("meta"):
        ours, expected = (dict(build_model(c, dtype=torch.float32).named_parameters()) for c in (plain, theirs))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in expected.items()}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"rms_norm_eps": None},
        {"rope_parameters": None},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"num_hidden_layers": "3"},
        {"num_attention_heads": True},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"auto_map": {"AutoConfig": "configuration.Mine"}},
        {"model_type": "gemma2"},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32},
        {"model_type": "qwen3", "use_sliding_window": False},  # whose heads have 128 dimensions unless it says so
        {"sliding_window": 32},  # no field of a Llama
    ],
)
def test_whatever_needs_a_familys_rules_is_left_to_transformers(change: dict[str, object], tmp_path: Path) -> None:
    fields = {name: value for name, value in CONFIGS["llama"].to_dict().items() if name != "head_dim"}
    assert read_plain_config(write(tmp_path, fields)) is not None
    assert read_plain_config(write(tmp_path, fields | change)) is None


def test_quantised_weights_change_nothing_about_the_layers(tmp_path: Path) -> None:
    fields = CONFIGS["llama"].to_dict()
    plain = read_plain_config(write(tmp_path, fields | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    assert plain == read_plain_config(write(tmp_path, fields))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": ["llama"]}', "\udcff"])
def test_a_file_that_is_no_config_is_left_to_transformers(text: str, tmp_path: Path) -> None:
    assert read_plain_config(tmp_path) is None
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    assert read_plain_config(tmp_path) is None


def test_a_common_model_is_loaded_without_the_imports_that_take_seconds(tmp_path: Path) -> None:
    LlamaForCausalLM(CONFIGS["llama"]).save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path)
    code = f"""
import sys, torch
from engine.config import ModelConfig
from engine.loading.loader import load_model
print(load_model(ModelConfig(path={str(tmp_path)!r}), dtype=torch.float32, seed=0).eos_token_ids)
print([name for name in ("torch._dynamo", "sympy", "transformers.models.llama") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[1, 7, 9]", "[]"]
