"""Families of models as GGUF files, named by the gguf package itself, compute what they did before they were files."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Format
from torch import Tensor
from transformers import (
    GemmaConfig,
    Glm4Config,
    GraniteConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from engine.config import ModelConfig
from engine.loading.loader import load_model, read_model_facts
from engine.models.model_error import ModelError
from engine.models.moe import SparseLlama
from tests.support import gguf_files
from tests.support.gguf_files import ROPE, THETA
from tests.support.model_cases import checkpoint, logits_of, reference

SHAPE = gguf_files.SHAPE | {"pad_token_id": 0, "rope_parameters": dict(ROPE)}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
Numbers = dict[str, int | float]


@dataclass(frozen=True)
class Family:
    """numbers: of the metadata, beyond those that all families have, without the family's name before them"""

    architecture: str
    config: PreTrainedConfig
    numbers: Numbers = field(default_factory=dict)


FAMILIES = {
    "granite": Family(
        "granite",
        GraniteConfig(
            **SHAPE | {"head_dim": 16}, logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0,
            attention_multiplier=0.25,
        ),
        {"attention.scale": 0.25, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 4.0},
    ),
    "glm4": Family(
        "glm4",
        Glm4Config(**SHAPE | {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, attention_bias=True),
        {"rope.dimension_count": 16, "attention.key_length": 32},
    ),
    "gemma": Family("gemma", GemmaConfig(**SHAPE, tie_word_embeddings=True), {"attention.key_length": 32}),
    "mixtral": Family(
        "llama", MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2), {"attention.key_length": 32}
    ),
    "qwen2-moe": Family(
        "qwen2moe",
        Qwen2MoeConfig(
            **SHAPE | {"head_dim": 16}, **EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=48
        ),
        {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 48},
    ),
    "qwen3-moe": Family(
        "qwen3moe",
        Qwen3MoeConfig(**SHAPE, **EXPERTS, moe_intermediate_size=32, norm_topk_prob=True),
        {"expert_feed_forward_length": 32, "attention.key_length": 32},
    ),
    "olmoe": Family("olmoe", OlmoeConfig(**SHAPE | {"head_dim": 16}, **EXPERTS)),
}  # fmt: skip
WITH_EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe")
_EXPERT = re.compile(r"(?P<layer>model\.layers\.\d+\.).*experts\.(?P<number>\d+)\.(?P<matrix>\w+)\.weight")
_KINDS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def converted(family: Family, weights: dict[str, Tensor], *, stacks: bool = True) -> dict[str, np.ndarray]:
    """As llama.cpp's conversion names and changes them: experts of a layer are one tensor, or in old files apart."""
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture),
        SHAPE["num_hidden_layers"],
    )
    found: dict[str, np.ndarray] = {}
    experts: defaultdict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for name, tensor in weights.items():
        match = _EXPERT.fullmatch(name)
        if match is not None:
            stem = f"blk.{match['layer'].split('.')[2]}.ffn_{_KINDS[match['matrix']]}"
            experts[stem][int(match["number"])] = tensor.numpy()
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        values = gguf_files.converted(
            "llama" if family.architecture == "granite" else family.architecture, name, tensor.numpy()
        )
        found[known] = values.squeeze()
    for stem, matrices in experts.items():
        if stacks:
            found[f"{stem}_exps.weight"] = np.stack([matrices[number] for number in sorted(matrices)])
        else:
            found |= {f"{stem}.{number}.weight": matrix for number, matrix in matrices.items()}
    return found


def write(
    path: Path, family: Family, weights: dict[str, Tensor], *, format: Format = Format.F32, stacks: bool = True
) -> Path:
    architecture, config = family.architecture, family.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_rope_freq_base(THETA)
    numbers = dict(family.numbers)
    if family.config.model_type.endswith(("moe", "mixtral")):
        numbers |= {"expert_count": 4, "expert_used_count": 2}
    for key, value in numbers.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{architecture}.{key}", value)
    gguf_files.add_tokenizer(writer)
    for name, values in converted(family, weights, stacks=stacks).items():
        kind = format if values.ndim > 1 and "norm" not in name and "_inp" not in name else Format.F32
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    gguf_files.finish(writer)
    return path


def assert_same_logits(path: Path, model: torch.nn.Module, *, implementation: str = "auto") -> None:
    config = ModelConfig.model_validate({"path": str(path), "implementation": implementation})
    loaded = load_model(config, dtype=torch.float32, seed=0)
    texts = [[(7 * i + 3 * j) % SHAPE["vocab_size"] for i in range(20)] for j in range(2)]
    for ids, found in zip(texts, logits_of(loaded.model, texts), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_it_did_before_it_was_a_file(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    model = reference(family.config)
    path = write(tmp_path / "m.gguf", family, checkpoint(model, tmp_path / "model"))
    facts = read_model_facts(ModelConfig(path=str(path)))
    assert (facts.experts.num_parameters > 0) == (name in WITH_EXPERTS)
    assert facts.architecture == type(model).__name__
    assert_same_logits(path, model)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_are_read_by_our_layers_and_by_those_of_transformers(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    model = reference(family.config)
    path = write(tmp_path / "m.gguf", family, checkpoint(model, tmp_path / "model"), format=Format.F16)
    with torch.no_grad():  # as the file rounds them
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not re.search(r"norm|mlp\.gate\.|shared_expert_gate", parameter_name):
                parameter.copy_(parameter.half().float())
    loaded = load_model(ModelConfig(path=str(path)), dtype=torch.float32, seed=0).model
    assert isinstance(loaded, SparseLlama)
    for implementation in ("own", "transformers"):
        assert_same_logits(path, model, implementation=implementation)


def test_experts_may_lie_apart_as_in_the_first_files(tmp_path: Path) -> None:
    family = FAMILIES["mixtral"]
    model = reference(family.config)
    path = write(tmp_path / "m.gguf", family, checkpoint(model, tmp_path / "model"), stacks=False)
    assert_same_logits(path, model)


def test_experts_in_blocks_are_read_one_by_one(tmp_path: Path) -> None:
    family = FAMILIES["qwen3-moe"]
    weights = checkpoint(reference(family.config), tmp_path / "model")
    path = write(tmp_path / "m.gguf", family, weights, format=Format.Q8_0)
    loaded = load_model(ModelConfig(path=str(path)), dtype=torch.float32, seed=0).model
    for number in range(4):
        name = f"model.layers.1.mlp.experts.{number}.down_proj.weight"
        raw = gguf.quantize(weights[name].numpy(), Format.Q8_0)
        expected = torch.from_numpy(gguf.dequantize(raw, Format.Q8_0))
        found = loaded.get_submodule("layers.1.mlp.experts").stacks[1][number]
        assert torch.equal(found, expected)


def test_a_family_whose_experts_are_not_known_is_named(tmp_path: Path) -> None:
    model = gguf_files.make_model("qwen3", tied=True)
    path = tmp_path / "m.gguf"
    gguf_files.write_gguf(path, "qwen3", gguf_files.state_of(model), extra={"qwen3.expert_count": 8})
    with pytest.raises(ModelError, match=r"mixture of experts of the family 'qwen3'.*safetensors"):
        read_model_facts(ModelConfig(path=str(path)))
