"""What a GGUF header says about a model, under the names of its Hugging Face config.

One function per family: the keys that only this family has. What every family has is in `_common`. Written against the
writer's side of the format (llama.cpp's conversion script), which is its definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from engine.loading.config_numbers import check_numbers
from engine.loading.gguf.header import GGUFHeader
from engine.models.model_error import ModelError

FieldValue: TypeAlias = str | int | float | bool | list[str] | list[int] | dict[str, "FieldValue"] | None
ConfigFields: TypeAlias = dict[str, FieldValue]


def config_fields(header: GGUFHeader, rope_freqs: np.ndarray | None = None) -> ConfigFields:
    """The fields of the Hugging Face config ("model_type" and "architectures" among them).

    rope_freqs: the content of the tensor `rope_freqs.weight`, [head_dim / 2], where the file has one. ModelError for a
    family that is not supported.
    """
    architecture = header.architecture
    if architecture not in FAMILIES:
        raise ModelError(
            f"{header.path} holds a model of the family {architecture!r}; as GGUF, {', '.join(sorted(FAMILIES))} are "
            "supported; use the model's safetensors directory or hub id instead"
        )
    has_experts = header.integer(f"{architecture}.expert_count", 0) > 0
    if has_experts and architecture not in _WITH_EXPERTS:
        raise ModelError(
            f"{header.path} is a mixture of experts of the family {architecture!r}, whose experts are read from "
            "safetensors only; use the model's directory or hub id instead"
        )
    fields = _common(header)
    check_numbers(dict(fields), str(header.path))
    try:
        if rope_freqs is not None:
            fields["rope_parameters"] = _llama3_rope(header, fields, rope_freqs)
        fields.update(FAMILIES[architecture](header))
    except ArithmeticError as error:
        raise ModelError(f"{header.path}: sizes in its header do not fit together ({error}); it is damaged") from error
    check_numbers(dict(fields), str(header.path))
    _check_shapes(header, fields)
    return fields


def _check_shapes(header: GGUFHeader, fields: ConfigFields) -> None:
    """A damaged header must not ask for a model of another size than the tensors that it lists."""
    sizes = {name: value for name, value in fields.items() if isinstance(value, int)}
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    width, last = sizes["num_attention_heads"] * sizes["head_dim"], sizes["num_hidden_layers"] - 1
    num_experts, of_expert = sizes.get("num_experts", 0), sizes.get("moe_intermediate_size", inner)
    down: dict[str, tuple[int, ...]] = {f"blk.{last}.ffn_down": (hidden, inner)}
    if num_experts:
        is_stacked = f"blk.{last}.ffn_down_exps.weight" in header.tensors
        down = {f"blk.{last}.ffn_down.{num_experts - 1}": (hidden, of_expert)}
        down = {f"blk.{last}.ffn_down_exps": (num_experts, hidden, of_expert)} if is_stacked else down
    expected = {
        "token_embd": (sizes["vocab_size"], hidden),
        **down,
        f"blk.{last}.attn_output": (hidden, width),
        f"blk.{last}.attn_q": (width, hidden),
        f"blk.{last}.attn_k": (sizes["num_key_value_heads"] * sizes["head_dim"], hidden),
    }
    for name, shape in expected.items():
        info = header.tensors.get(f"{name}.weight")
        if info is None and name.endswith(("attn_q", "attn_k")):
            continue  # merged, as Phi-3's are
        if info is None or info.shape != shape:
            found = "missing" if info is None else str(info.shape)
            raise ModelError(f"{header.path}: {name}.weight is {found}, but the header says {shape}; it is damaged")


def _common(header: GGUFHeader) -> ConfigFields:
    key = f"{header.architecture}.{{}}".format
    hidden_size, num_heads = header.integer(key("embedding_length")), header.integer(key("attention.head_count"))
    if min(hidden_size, num_heads) < 1 or "token_embd.weight" not in header.tensors:
        raise ModelError(f"{header.path} describes no usable model: hidden size {hidden_size}, {num_heads} heads")
    rotary = header.integer(key("rope.dimension_count"), 0)
    return {
        "hidden_size": hidden_size,
        "intermediate_size": header.integer(key("feed_forward_length")),
        "num_hidden_layers": header.integer(key("block_count")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": header.integer(key("attention.head_count_kv"), num_heads),
        "head_dim": header.integer(key("attention.key_length"), rotary or hidden_size // num_heads),
        "max_position_embeddings": header.integer(key("context_length")),
        "rms_norm_eps": header.number(key("attention.layer_norm_rms_epsilon")),
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_output.bias" in header.tensors,  # of all four; Qwen2's three go by its name
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "hidden_act": "silu",
        "rope_parameters": _rope(header),
        "bos_token_id": _token_id(header, "bos"),
        "eos_token_id": _end_ids(header),
        "pad_token_id": _token_id(header, "padding"),
    }


def _token_id(header: GGUFHeader, name: str) -> int | None:
    value = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if isinstance(value, int) else None


def _end_ids(header: GGUFHeader) -> list[int]:
    """What ends a text, a turn and a message: any of them ends an answer."""
    found = [_token_id(header, name) for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(token_id for token_id in found if token_id is not None))


def _rope(header: GGUFHeader) -> dict[str, FieldValue]:
    key = f"{header.architecture}.rope.{{}}".format
    theta = header.number(key("freq_base"), 10000.0)
    kind = header.metadata.get(key("scaling.type"), "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{header.path}: rope scaling {kind!r} is not supported as GGUF; use the safetensors model")
    rope: dict[str, FieldValue] = {"rope_type": kind, "rope_theta": theta}
    rope["factor"] = header.number(key("scaling.factor"))
    if kind == "yarn":
        rope["original_max_position_embeddings"] = header.integer(key("scaling.original_context_length"))
    return rope


def _llama3_rope(header: GGUFHeader, fields: ConfigFields, rope_freqs: np.ndarray) -> dict[str, FieldValue]:
    """Llama 3.1's scaling, which the writer stores as the finished divisors of the frequencies.

    The parameters are those of the published models; the divisors they give must be the file's.
    """
    theta, head_dim = header.number(f"{header.architecture}.rope.freq_base", 10000.0), fields["head_dim"]
    factor, low, high, original = float(rope_freqs.max()), 1.0, 4.0, 8192
    assert isinstance(head_dim, int)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if rope_freqs.shape != expected.shape or not np.allclose(rope_freqs, expected, rtol=1e-3):
        raise ModelError(f"{header.path}: its rope_freqs are not Llama 3's; use the model's safetensors instead")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _experts(header: GGUFHeader) -> ConfigFields:
    """The mixture that every layer has."""
    key = f"{header.architecture}.{{}}".format
    return {
        "num_experts": header.integer(key("expert_count")),
        "num_experts_per_tok": header.integer(key("expert_used_count")),
        "moe_intermediate_size": header.integer(key("expert_feed_forward_length")),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _llama(header: GGUFHeader) -> ConfigFields:
    if header.integer("llama.expert_count", 0) > 0:
        num_experts = header.integer("llama.expert_count")
        return {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_experts": num_experts,
            "num_local_experts": num_experts,
            "num_experts_per_tok": header.integer("llama.expert_used_count"),
            "sliding_window": None,
        }
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "pretraining_tp": 1}


def _smollm3(header: GGUFHeader) -> ConfigFields:
    num_layers, interval = header.integer("smollm3.block_count"), 4  # the format has no key for it
    return {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "no_rope_layer_interval": interval,
        "no_rope_layers": [int((layer + 1) % interval != 0) for layer in range(num_layers)],
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * num_layers,
    }


def _qwen2(header: GGUFHeader) -> ConfigFields:
    num_layers = header.integer("qwen2.block_count")
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * num_layers,
    }


def _qwen3(header: GGUFHeader) -> ConfigFields:
    num_layers = header.integer("qwen3.block_count")
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * num_layers,
    }


def _qwen2moe(header: GGUFHeader) -> ConfigFields:
    num_layers = header.integer("qwen2moe.block_count")
    return _experts(header) | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "qkv_bias": True,
        "norm_topk_prob": False,  # the format has no key for it: as of all that were published
        "shared_expert_intermediate_size": header.integer("qwen2moe.expert_shared_feed_forward_length"),
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * num_layers,
    }


def _qwen3moe(header: GGUFHeader) -> ConfigFields:
    return _experts(header) | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "norm_topk_prob": True,  # likewise
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _olmoe(header: GGUFHeader) -> ConfigFields:
    size = header.integer("olmoe.feed_forward_length")  # of one expert
    of_layers = _experts(header) if "olmoe.expert_feed_forward_length" in header.metadata else {}
    return of_layers | {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "num_experts": header.integer("olmoe.expert_count"),
        "num_experts_per_tok": header.integer("olmoe.expert_used_count"),
        "moe_intermediate_size": size,
        "intermediate_size": size,
        "norm_topk_prob": False,  # likewise
        "clip_qkv": None,
    }


def _granite(header: GGUFHeader) -> ConfigFields:
    return {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": header.number("granite.attention.scale", 1.0),
        "embedding_multiplier": header.number("granite.embedding_scale", 1.0),
        "residual_multiplier": header.number("granite.residual_scale", 1.0),
        "logits_scaling": header.number("granite.logit_scale", 1.0),
    }


def _glm4(header: GGUFHeader) -> ConfigFields:
    hidden_size, num_heads = header.integer("glm4.embedding_length"), header.integer("glm4.attention.head_count")
    head_dim = header.integer("glm4.attention.key_length", hidden_size // num_heads)
    rotary_factor = header.integer("glm4.rope.dimension_count", head_dim) / head_dim
    return {
        "model_type": "glm4",
        "architectures": ["Glm4ForCausalLM"],
        "head_dim": head_dim,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,  # of queries, keys and values alone
        "partial_rotary_factor": rotary_factor,
        "rope_parameters": {**_rope(header), "partial_rotary_factor": rotary_factor},
    }


def _gemma(header: GGUFHeader) -> ConfigFields:
    return {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _phi3(header: GGUFHeader) -> ConfigFields:
    if any(name.startswith("rope_factors_") for name in header.tensors):
        raise ModelError(f"{header.path}: Phi-3's long rope is not supported as GGUF; use the safetensors model")
    hidden_size, num_heads = header.integer("phi3.embedding_length"), header.integer("phi3.attention.head_count")
    head_dim, context = hidden_size // num_heads, header.integer("phi3.context_length")
    window = header.integer("phi3.attention.sliding_window", 0)
    rotary_factor = header.integer("phi3.rope.dimension_count", head_dim) / head_dim
    return {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "head_dim": head_dim,
        "original_max_position_embeddings": context,
        "partial_rotary_factor": rotary_factor,
        "rope_parameters": {**_rope(header), "partial_rotary_factor": rotary_factor},
        "sliding_window": window or None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


def _gemma_common(header: GGUFHeader) -> ConfigFields:
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": header.integer(f"{header.architecture}.attention.sliding_window", 4096),
    }


def _gemma2(header: GGUFHeader) -> ConfigFields:
    num_layers, hidden_size = header.integer("gemma2.block_count"), header.integer("gemma2.embedding_length")
    num_heads, head_dim = header.integer("gemma2.attention.head_count"), header.integer("gemma2.attention.key_length")
    is_27b = num_layers == 46  # the one size whose queries are scaled by the hidden size; the format has no key for it
    return _gemma_common(header) | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": header.number("gemma2.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": header.number("gemma2.final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": hidden_size // num_heads if is_27b else head_dim,
    }


def _gemma3(header: GGUFHeader) -> ConfigFields:
    num_layers, hidden_size = header.integer("gemma3.block_count"), header.integer("gemma3.embedding_length")
    num_heads, head_dim = header.integer("gemma3.attention.head_count"), header.integer("gemma3.attention.key_length")
    is_27b = num_layers == 62
    return _gemma_common(header) | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "query_pre_attn_scalar": hidden_size // num_heads if is_27b else head_dim,
        "rope_parameters": {  # layers with a window keep the base that Gemma 3 has always used for them
            "full_attention": _rope(header),
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }


FAMILIES: dict[str, Callable[[GGUFHeader], ConfigFields]] = {
    "llama": _llama,  # Mistral, SmolLM2 and Mixtral too: the format gives them the same name
    "smollm3": _smollm3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen2moe": _qwen2moe,
    "qwen3moe": _qwen3moe,
    "olmoe": _olmoe,
    "granite": _granite,
    "glm4": _glm4,
    "phi3": _phi3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
_WITH_EXPERTS = {"llama", "qwen2moe", "qwen3moe", "olmoe"}
