"""GGUF files of tiny models, written as the converter of llama.cpp names and orders their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Format
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
THETA = 50000.0
ROPE = {"rope_type": "default", "rope_theta": THETA}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 16}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, rope_parameters=dict(ROPE)),
    "smollm3": SmolLM3Config(**SHAPE, rope_parameters=dict(ROPE), pad_token_id=0),
    "qwen2": Qwen2Config(**SHAPE, rope_parameters=dict(ROPE)),
    "qwen3": Qwen3Config(**SHAPE, rope_parameters=dict(ROPE)),
    "phi3": Phi3Config(**(SHAPE | {"head_dim": 16}), rope_parameters=dict(ROPE), pad_token_id=0, sliding_window=16),
    "gemma2": Gemma2Config(**SHAPE, rope_parameters=dict(ROPE), **GEMMA),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        rope_parameters={"full_attention": dict(ROPE), "sliding_attention": {**ROPE, "rope_theta": 10000.0}},
        **GEMMA,
    ),
}
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "in"]


def make_model(architecture: str, *, tied: bool, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[architecture])
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 1.0 if parameter.dim() == 1 else 0.2)
    return model.eval()


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def gguf_name(architecture: str, name: str) -> str:
    names = GEMMA_NAMES if architecture.startswith("gemma") else NAMES
    stem, _, kind = name.rpartition(".")
    if stem in names:
        return f"{names[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{names[inner]}.{kind}"


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What the converter does to q and k of some architectures."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def converted(architecture: str, name: str, weight: np.ndarray) -> np.ndarray:
    heads = {"q_proj": SHAPE["num_attention_heads"], "k_proj": SHAPE["num_key_value_heads"]}
    projection = name.split(".")[-2]
    if architecture in ("llama", "smollm3") and projection in heads:
        return interleave(weight, heads[projection])
    if architecture.startswith("gemma") and "norm" in name:
        return weight + 1
    return weight


def write_gguf(
    path: Path,
    architecture: str,
    state: dict[str, Tensor],
    format: Format = Format.F32,
    rope_freqs: np.ndarray | None = None,
    extra: dict[str, int] | None = None,
    **split: int,
) -> Path:
    """extra: numbers of the metadata besides those of the shape; split: how the writer cuts the file into parts"""
    writer = gguf.GGUFWriter(path, architecture, **split)
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value)
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_rope_freq_base(THETA)
    if architecture in ("phi3", "gemma2", "gemma3"):
        writer.add_sliding_window(16)
    if architecture == "phi3":
        writer.add_rope_dimension_count(16)
    else:
        writer.add_key_length(SHAPE["head_dim"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    add_tokenizer(writer)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    for name, tensor in state.items():
        weight = converted(architecture, name, tensor.numpy())
        kind = format if tensor.dim() == 2 else Format.F32
        raw = gguf.quantize(np.ascontiguousarray(weight), kind)
        writer.add_tensor(gguf_name(architecture, name), raw, raw_dtype=kind)
    finish(writer)
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = TOKENS + [f"<extra_{i}>" for i in range(SHAPE["vocab_size"] - len(TOKENS))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")


BLOCKS = {  # where the float16 scale of a block lies, and the minimum's, if it has one
    Format.Q4_0: (0,), Format.Q4_1: (0, 2), Format.Q5_0: (0,), Format.Q5_1: (0, 2), Format.Q8_0: (0,),
    Format.Q2_K: (80, 82), Format.Q3_K: (108,), Format.Q4_K: (0, 2), Format.Q5_K: (0, 2), Format.Q6_K: (208,),
    Format.IQ4_NL: (0,), Format.IQ4_XS: (0,), Format.MXFP4: (),
}  # fmt: skip


_MINIMA = {  # as multiples of the scale, so that weights are around zero: the mean level, negative where it is added
    Format.Q4_1: -7.5, Format.Q5_1: -15.5, Format.Q2_K: 1.5, Format.Q4_K: 7.5, Format.Q5_K: 15.5,
}  # fmt: skip


def random_blocks(
    rng: np.random.Generator, shape: tuple[int, int], format: Format = Format.Q4_0, *, size: float = 0.05
) -> np.ndarray:
    """Any bits, but for scales with which the root of the weights' mean square is about `size`; [rows, bytes]"""
    num_elements, num_bytes = gguf.GGML_QUANT_SIZES[format]
    raw = rng.integers(0, 256, (shape[0] * shape[1] // num_elements, num_bytes), np.uint8)
    if format is Format.MXFP4:
        raw[:, 0] = rng.integers(120, 124, len(raw)) + round(np.log2(size / 0.1))
        return raw.reshape(shape[0], -1)
    scales = rng.uniform(0.5, 1.0, len(raw))
    for factor in (1.0, None):
        if factor is None:
            factor = size / np.sqrt(np.mean(gguf.dequantize(raw[:64], format) ** 2))
        for place, ratio in zip(BLOCKS[format], (1.0, _MINIMA.get(format, 0.0)), strict=False):
            halves = (factor * ratio * scales).astype(np.float16)
            raw[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    return raw.reshape(shape[0], -1)


def write_random_blocks(
    path: Path,
    config: LlamaConfig,
    format_of: Callable[[str], Format] = lambda name: Format.Q4_0,
    *,
    is_hole: bool = False,
    **split: int,
) -> Path:
    """A Llama of any size. format_of: a matrix, by the name of its tensor without the layer

    is_hole: as zeros that take no room on the disk; reading its header is all that is cheap
    """
    writer, rng = gguf.GGUFWriter(path, "llama", **split), np.random.default_rng(0)
    hidden, inner, num_bytes = config.hidden_size, config.intermediate_size, 0
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(THETA)
    add_tokenizer(writer)
    of_layer = {
        "ffn_down": (hidden, inner), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "attn_k": (keys, hidden),
        "attn_output": (hidden, hidden), "attn_q": (hidden, hidden), "attn_v": (keys, hidden),
    }  # fmt: skip
    matrices = {"token_embd": (config.vocab_size, hidden)}
    matrices |= {} if config.tie_word_embeddings else {"output": (config.vocab_size, hidden)}
    norms = ["output_norm"]
    for i in range(config.num_hidden_layers):
        matrices |= {f"blk.{i}.{name}": shape for name, shape in of_layer.items()}
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
    kinds = {name: format_of(name.rpartition(".")[2]) for name in matrices} | dict.fromkeys(norms, Format.F32)
    for name, shape in {**matrices, **dict.fromkeys(norms, (hidden,))}.items():
        kind, is_blocks = kinds[name], kinds[name] in BLOCKS
        if is_hole:
            raw_shape = gguf.quant_shape_to_byte_shape(shape, kind) if is_blocks else shape
            dtype = np.dtype(np.uint8 if is_blocks else np.float32)
            size = int(np.prod(raw_shape)) * dtype.itemsize
            writer.add_tensor_info(f"{name}.weight", raw_shape, dtype, size, raw_dtype=kind)
            num_bytes += -(-size // 32) * 32
        else:
            raw = random_blocks(rng, shape, kind) if is_blocks else _plain(rng, shape, kind)
            writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
    if not is_hole:
        finish(writer)
        return path
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as opened:
        opened.truncate(-(-path.stat().st_size // 32) * 32 + num_bytes)
    return path


def _plain(rng: np.random.Generator, shape: tuple[int, ...], kind: Format) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return gguf.quantize((0.05 * rng.standard_normal(shape)).astype(np.float32), kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
