"""Tiny Llama checkpoints whose matrices are quantised, and the weights of floats that they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tests.support.quantizers import Quantize

SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def config_fields(**changes: object) -> dict[str, object]:
    """Of a config.json that leaves nothing out, as transformers would write it."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    family = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {**SIZES, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_parameters": rope, **family, **changes}


OLMOE = {  # whose layers have experts, and norms over all heads
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "intermediate_size": 96,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
}


def shapes_of(fields: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """The weights of such a model and their shapes."""

    def number(name: str) -> int:
        value = fields[name]
        assert isinstance(value, int)
        return value

    hidden, inner, head = number("hidden_size"), number("intermediate_size"), number("head_dim")
    queries, keys = head * number("num_attention_heads"), head * number("num_key_value_heads")
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens": (number("vocab_size"), hidden), "model.norm": (hidden,)}
    if not fields["tie_word_embeddings"]:
        found["lm_head"] = (number("vocab_size"), hidden)
    for layer in range(number("num_hidden_layers")):
        matrices = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
        }
        norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        places = ["mlp"]
        if "num_experts" in fields:
            places = [f"mlp.experts.{expert}" for expert in range(number("num_experts"))]
            matrices["mlp.gate"] = (number("num_experts"), hidden)
            norms |= {"self_attn.q_norm": (queries,), "self_attn.k_norm": (keys,)}
        for place in places:
            matrices |= {f"{place}.{name}": (inner, hidden) for name in ("gate_proj", "up_proj")}
            matrices[f"{place}.down_proj"] = (hidden, inner)
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in (matrices | norms).items()}
    return {f"{name}.weight": shape for name, shape in found.items()}


def float_state(fields: Mapping[str, object]) -> dict[str, Tensor]:
    """Weights that float16 holds, of sizes that let each layer count."""
    torch.manual_seed(0)
    state = {}
    for name, shape in shapes_of(fields).items():
        size = 1.0 if "embed" in name else 0.2 if "lm_head" in name else shape[-1] ** -0.5
        state[name] = (torch.randn(shape) * size if len(shape) > 1 else torch.rand(shape) + 0.5).half().float()
    return state


def write_checkpoint(
    directory: Path,
    quantize: Quantize | Mapping[str, Quantize],
    quantization: Mapping[str, object] | None,
    *,
    dtype: torch.dtype = torch.float16,
    changes: Mapping[str, object] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    max_bytes: int = 1 << 30,
) -> dict[str, Tensor]:
    """Writes a checkpoint; the matrices of layers by `quantize`, or those whose names contain a key of it.

    Returns the weights of floats that it stands for, in float32, by their names.
    """
    fields = config_fields(**(changes or {}))
    state = float_state(fields)
    tensors: dict[str, Tensor] = {}
    for name, weight in list(state.items()):
        layer = name.removesuffix(".weight")
        chosen = quantize if callable(quantize) else next((q for key, q in quantize.items() if key in name), None)
        if chosen is None or not layer.endswith("_proj" if callable(quantize) else layer):
            tensors[name] = weight.to(dtype)
            state[name] = tensors[name].float()
            continue
        found, dense = chosen(layer, *weight.shape)
        tensors |= {f"{layer}.{key}": tensor for key, tensor in found.items()}
        state[name] = torch.from_numpy(dense.astype(np.float32))
    tensors |= extra or {}
    if quantization is not None:
        fields["quantization_config"] = dict(quantization)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    _save(tensors, directory, max_bytes)
    write_tokenizer(directory)
    return state


def write_random_gptq(directory: Path, *, group_size: int = 128, **changes: object) -> None:
    """A GPTQ checkpoint of 4 bits without zero points whose integers are noise: large ones are made in no time."""
    fields = config_fields(**changes)
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True}
    (directory / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization}))
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes_of(fields).items():
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj"):
            tensors[name] = torch.randn(shape).half() if len(shape) > 1 else torch.ones(shape).half()
            continue
        num_rows, depth = shape
        groups = depth // group_size
        words = torch.randint(-(1 << 31), 1 << 31, (depth // 8, num_rows), dtype=torch.int64).to(torch.int32)
        tensors[f"{layer}.qweight"] = words
        tensors[f"{layer}.qzeros"] = torch.full((groups, num_rows // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{layer}.scales"] = (torch.rand(groups, num_rows) + 0.5).half() / (8 * depth**0.5)
    _save(tensors, directory, 1 << 40)
    write_tokenizer(directory)


def write_floats(directory: Path, state: Mapping[str, Tensor], **changes: object) -> None:
    """The checkpoint of floats that a quantised one stands for."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_fields(**changes)))
    _save(state, directory, 1 << 40)
    write_tokenizer(directory)


def _save(tensors: Mapping[str, Tensor], directory: Path, max_bytes: int) -> None:
    """One file, or several, in which a matrix's tensors may be apart."""
    files: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if files[-1] and sum(t.nbytes for t in files[-1].values()) + tensor.nbytes > max_bytes:
            files.append({})
        files[-1][name] = tensor.contiguous()
    if len(files) == 1:
        save_file(files[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    index = {}
    for number, part in enumerate(files):
        save_file(part, directory / f"model-{number}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def write_tokenizer(directory: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
