"""Checkpoints of a model's shape whose integers are noise: as large as published ones, and made without a download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Format
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor

from loadtest.micro.shapes import Shape

_HALVES = {Format.Q4_K: (0, 2), Format.Q6_K: (208,)}  # where a block has its float16 scale, and its minimum's
_SCALE = 2e-5  # of blocks, by which weights are of the size that trained ones have
_TOKENS = 256


def matrices_of(shape: Shape) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(Hugging Face's name, GGUF's name, sizes) of each matrix of a layer."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield "self_attn.q_proj", "attn_q", (queries, hidden)
    yield "self_attn.k_proj", "attn_k", (keys, hidden)
    yield "self_attn.v_proj", "attn_v", (keys, hidden)
    yield "self_attn.o_proj", "attn_output", (hidden, queries)
    yield "mlp.gate_proj", "ffn_gate", (inner, hidden)
    yield "mlp.up_proj", "ffn_up", (inner, hidden)
    yield "mlp.down_proj", "ffn_down", (hidden, inner)


def _norms_of(shape: Shape) -> Iterator[tuple[str, str, int]]:
    """(Hugging Face's name, GGUF's name, size) of each vector of a layer."""
    yield "input_layernorm", "attn_norm", shape.hidden_size
    yield "post_attention_layernorm", "ffn_norm", shape.hidden_size
    if shape.architecture.startswith("Qwen3"):
        yield "self_attn.q_norm", "attn_q_norm", shape.head_dim
        yield "self_attn.k_norm", "attn_k_norm", shape.head_dim


def format_in_q4_k_m(name: str, layer: int, num_layers: int) -> Format:
    """As llama.cpp's Q4_K_M has it: Q6_K for the table, and for values and down projections of half the layers."""
    is_wide = layer < num_layers // 8 or layer >= 7 * num_layers // 8 or (layer - num_layers // 8) % 3 == 2
    return Format.Q6_K if name == "token_embd" or (name in ("attn_v", "ffn_down") and is_wide) else Format.Q4_K


def write_gguf(path: Path, shape: Shape, *, max_length: int = 4096) -> Path:
    """A GGUF file in Q4_K_M."""
    rng, family = np.random.default_rng(0), shape.architecture.removesuffix("ForCausalLM").lower()
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(max_length)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(shape.rope_theta)
    _add_tokenizer(writer, shape.vocab_size)
    names = {"token_embd": (format_in_q4_k_m("token_embd", 0, 1), (shape.vocab_size, shape.hidden_size))}
    norms = {"output_norm": shape.hidden_size}
    for layer in range(shape.num_layers):
        for _, name, sizes in matrices_of(shape):
            names[f"blk.{layer}.{name}"] = format_in_q4_k_m(name, layer, shape.num_layers), sizes
        norms |= {f"blk.{layer}.{name}": size for _, name, size in _norms_of(shape)}
    for name, (kind, sizes) in names.items():
        writer.add_tensor(f"{name}.weight", _blocks(rng, sizes, kind), raw_dtype=kind)
    for name, size in norms.items():
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32), raw_dtype=Format.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _blocks(rng: np.random.Generator, shape: tuple[int, int], kind: Format) -> np.ndarray:
    num_elements, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (shape[0] * shape[1] // num_elements, num_bytes), np.uint8)
    for place, ratio in zip(_HALVES[kind], (1.0, 7.5), strict=False):
        halves = (rng.uniform(0.5, 1.0, len(raw)) * _SCALE * ratio).astype(np.float16)
        raw[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    return raw.reshape(shape[0], -1)


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    known = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokens = [*known, *(f"<{number}>" for number in range(len(known), vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * vocab_size)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(vocab_size - 2)
    writer.add_eos_token_id(vocab_size - 1)


def write_gptq(directory: Path, shape: Shape, *, group_size: int = 128, max_length: int = 4096) -> Path:
    """A directory with GPTQ's int4 in the layers, and float16 in the table."""
    config = shape.config(max_length=max_length)
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": torch.randn(shape.vocab_size, shape.hidden_size).half() / 50,
        "model.norm.weight": torch.ones(shape.hidden_size).half(),
    }
    for layer in range(shape.num_layers):
        for name, _, (num_rows, depth) in matrices_of(shape):
            groups, place = depth // group_size, f"model.layers.{layer}.{name}"
            words = torch.randint(-(1 << 31), 1 << 31, (depth // 8, num_rows), dtype=torch.int64)
            tensors[f"{place}.qweight"] = words.to(torch.int32)
            tensors[f"{place}.qzeros"] = torch.full((groups, num_rows // 8), 0x77777777, dtype=torch.int32)
            tensors[f"{place}.scales"] = (torch.rand(groups, num_rows) + 0.5).half() / (8 * depth**0.5)
        for name, _, size in _norms_of(shape):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(size).half()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(directory, shape.vocab_size)
    return directory


def write_floats(directory: Path, shape: Shape, *, max_length: int = 4096) -> Path:
    """A directory of bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape.config(max_length=max_length), indent=1) + "\n")
    matrices = {"model.embed_tokens": (shape.vocab_size, shape.hidden_size)}
    norms = {"model.norm": shape.hidden_size}
    for layer in range(shape.num_layers):
        matrices |= {f"model.layers.{layer}.{name}": sizes for name, _, sizes in matrices_of(shape)}
        norms |= {f"model.layers.{layer}.{name}": size for name, _, size in _norms_of(shape)}
    tensors = {f"{name}.weight": torch.randn(sizes).bfloat16() / 50 for name, sizes in matrices.items()}
    tensors |= {f"{name}.weight": torch.ones(size).bfloat16() for name, size in norms.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(directory, shape.vocab_size)
    return directory


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Of bytes, and of tokens that stand for themselves."""
    from tokenizers import Tokenizer, decoders, models

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:_TOKENS]
    vocab = {token: number for number, token in enumerate(letters)}
    vocab |= {f"<{number}>": number for number in range(len(letters), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
