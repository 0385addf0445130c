"""What each matrix is kept as is counted after packing, not read off a setting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Format
from transformers import LlamaConfig, Qwen3MoeConfig

from engine.build import build_engine
from engine.config import EngineConfig
from engine.ipc.messages import ModelInfo
from tests.support import gguf_files

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LAYERS = ["layers.self_attn.qkv_proj", "layers.self_attn.o_proj", "layers.mlp.gate_up_proj", "layers.mlp.down_proj"]


def start(path: Path, **sections: dict[str, object]) -> ModelInfo:
    settings = {"model": {"path": str(path)}, "device": {"num_threads": 1}}
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    return build_engine(EngineConfig.model_validate(settings), lambda phase, detail: None)[1]


@pytest.mark.parametrize(
    ("format", "kept_as"), [(Format.Q4_0, "Q4_0"), (Format.Q8_0, "int8"), (Format.BF16, "bfloat16")]
)
def test_a_gguf_says_what_its_matrices_came_to(format: Format, kept_as: str, tmp_path: Path) -> None:
    model = gguf_files.make_model("llama", tied=False)
    info = start(gguf_files.write_gguf(tmp_path / "m.gguf", "llama", gguf_files.state_of(model), format))
    merged = {name for name in LAYERS if "qkv" in name or "gate_up" in name}
    for name in LAYERS:
        assert list(info.weights[name]) == [kept_as], name
        assert sum(info.weights[name].values()) == 2
    assert merged <= set(info.weights)
    assert info.weights["lm_head"] == {kept_as: 1}
    assert info.weights["embed_tokens"] == {kept_as: 1}  # as the file has it


@pytest.mark.parametrize(
    ("kernels", "quantization", "expected"),
    [
        ("numba", "int4", {"int4": 3}),
        ("numba", "int8", {"int8": 3}),
        ("numba", "fp16", {"float16": 3}),
        ("torch", "int8", {"int8": 3}),
        ("torch", "none", {"float32": 3}),
    ],
)
def test_each_layer_is_counted(kernels: str, quantization: str, expected: dict[str, int], tmp_path: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    model = {"load_format": "dummy", "quantization": quantization, "dtype": "float32"}
    info = start(tmp_path, model=model, device={"kernels": kernels})
    assert {name: info.weights[name] for name in LAYERS} == dict.fromkeys(LAYERS, expected)
    assert info.weights["embed_tokens"] == {"float32": 1}


def test_what_a_format_cannot_hold_shows(tmp_path: Path) -> None:
    """A matrix with an element beyond float16's range stays float32, whatever was asked for."""
    model = gguf_files.make_model("llama", tied=False)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1e5
    info = start(gguf_files.write_gguf(tmp_path / "m.gguf", "llama", gguf_files.state_of(model), Format.F32))
    assert info.weights["layers.mlp.down_proj"] == {"float16": 1, "float32": 1}


def test_experts_are_named_too(tmp_path: Path) -> None:
    Qwen3MoeConfig(**SIZES, **EXPERTS).save_pretrained(tmp_path)
    info = start(tmp_path, model={"load_format": "dummy"})
    assert any("expert" in name for name in info.weights)
    assert sum(sum(formats.values()) for formats in info.weights.values()) > 4 * 3
