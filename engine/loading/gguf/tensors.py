"""A GGUF file as a Hugging Face checkpoint: its config, and its tensors by their Hugging Face names."""

from __future__ import annotations

import mmap
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.loading.gguf.config_fields import config_fields
from engine.loading.gguf.dequantize import dequantize
from engine.loading.gguf.header import GGUFHeader, TensorInfo
from engine.models.checkpoint_config import BareConfig, CheckpointConfig
from engine.models.model_error import ModelError
from engine.models.registry import MODELS

_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FAMILY_LAYER_NAMES = {  # where a family's names mean something else
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "gemma2": {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_FAMILY_LAYER_NAMES["gemma3"] = _FAMILY_LAYER_NAMES["gemma2"]
_INTERLEAVED_ROPE = {"llama", "smollm3"}  # the writer reorders q and k so that a rotation's pair lies side by side
_NORMS_PLUS_ONE = {"gemma2", "gemma3"}  # the writer adds the 1 that the layer adds
_MAX_AHEAD = 4  # tensors
_ROPE_FREQS = "rope_freqs.weight"  # read for the config, no weight of the model


def gguf_config(header: GGUFHeader, *, implementation: str = "auto") -> CheckpointConfig:
    """The config of the model in the file: bare fields for our own layers, its family's class for transformers'.

    ModelError where the family is not supported.
    """
    freqs = _read_rope_freqs(header) if _ROPE_FREQS in header.tensors else None
    config = BareConfig(**config_fields(header, freqs))
    return config if implementation != "transformers" and config.model_type in MODELS else config.of_family()


def gguf_weights(header: GGUFHeader, dtype: torch.dtype, *, num_threads: int = 1) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor of `dtype`) in the order of the file, or of its parts.

    A few are computed ahead while the consumer copies one: never is there a second copy of the model.
    """
    heads = _rope_heads(header)
    data = {file: _map(file) for file in {info.file for info in header.tensors.values()}}

    def compute(info: TensorInfo) -> tuple[str, Tensor]:
        name = hugging_face_name(header, info.name)
        return name, _restore(header, info, _read(data[info.file], info), heads).to(dtype)

    infos = [info for info in header.tensors.values() if info.name != _ROPE_FREQS]
    num_at_once = min(num_threads, _MAX_AHEAD)
    with ThreadPoolExecutor(num_at_once) as pool:  # torch and numpy hold no interpreter lock
        pending = deque(pool.submit(compute, info) for info in infos[:num_at_once])
        for info in [*infos[num_at_once:], *[None] * len(pending)]:
            weight = pending.popleft().result()
            if info is not None:
                pending.append(pool.submit(compute, info))
            yield weight


def hugging_face_name(header: GGUFHeader, name: str) -> str:
    """The checkpoint's name of a tensor. ModelError for one that the family is not known to have."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{kind}"
    names = _LAYER_NAMES | _FAMILY_LAYER_NAMES.get(header.architecture, {})
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None or match[2] not in names:
        raise ModelError(f"{header.path}: tensor {name!r} has no counterpart in a {header.architecture} model")
    return f"model.layers.{match[1]}.{names[match[2]]}.{kind}"


def _rope_heads(header: GGUFHeader) -> dict[str, int]:
    if header.architecture not in _INTERLEAVED_ROPE:
        return {}
    num_heads = header.integer(f"{header.architecture}.attention.head_count")
    return {"attn_q": num_heads, "attn_k": header.integer(f"{header.architecture}.attention.head_count_kv", num_heads)}


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)  # writable to torch, but never written


def _read(data: mmap.mmap, info: TensorInfo) -> Tensor:
    raw = torch.frombuffer(data, dtype=torch.uint8, offset=info.offset, count=info.num_bytes)
    if info.offset % 8:
        raw = raw.clone()  # only an aligned tensor can be viewed as another type
    try:
        return dequantize(raw, info.type, info.shape)
    except ValueError as error:
        raise ModelError(f"{info.file}: tensor {info.name!r}: {error}") from error


def _restore(header: GGUFHeader, info: TensorInfo, weight: Tensor, heads: dict[str, int]) -> Tensor:
    """Undoes what the writer changed."""
    stem = info.name.split(".")[-2]
    if stem in heads:
        if weight.shape[0] % (2 * heads[stem]):
            raise ModelError(f"{header.path}: {info.name!r} has {weight.shape[0]} rows for {heads[stem]} heads")
        pairs = weight.view(heads[stem], -1, 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape)
    if header.architecture in _NORMS_PLUS_ONE and stem.endswith("norm"):
        return weight.float() - 1
    return weight


def _read_rope_freqs(header: GGUFHeader) -> np.ndarray:
    info = header.tensors[_ROPE_FREQS]
    freqs: np.ndarray = _read(_map(info.file), info).double().numpy()
    return freqs
