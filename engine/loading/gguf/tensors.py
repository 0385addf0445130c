"""A GGUF file as a Hugging Face checkpoint: its config, and its tensors by their Hugging Face names."""

from __future__ import annotations

import mmap
import re
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Format
from torch import Tensor

from engine.loading.gguf.blocks import KINDS, Blocks
from engine.loading.gguf.config_fields import config_fields
from engine.loading.gguf.dequantize import ONE_THREAD, dequantize
from engine.loading.gguf.header import GGUFHeader, TensorInfo
from engine.models.checkpoint_config import BareConfig, CheckpointConfig
from engine.models.model_error import ModelError
from engine.models.registry import MODELS
from engine.quantization.stored_levels import StoredLevels
from engine.quantization.threads import Threads
from kernels.numba.core.formats import SIZES

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
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_EXPERT_NAMES = {  # of each expert's matrices
    "ffn_gate": "mlp.experts.{}.gate_proj", "ffn_up": "mlp.experts.{}.up_proj", "ffn_down": "mlp.experts.{}.down_proj",
}  # fmt: skip
_STACK = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight")  # of all experts' matrices in a layer
_FAMILY_LAYER_NAMES = {  # where a family's names mean something else
    "llama": {"ffn_gate_inp": "block_sparse_moe.gate"},  # Mixtral
    "glm4": {
        "ffn_up": "mlp.gate_up_proj",
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    },
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "gemma2": {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_FAMILY_LAYER_NAMES["gemma3"] = _FAMILY_LAYER_NAMES["gemma2"]
_FAMILY_EXPERT_NAMES = {
    "llama": {  # Mixtral
        "ffn_gate": "block_sparse_moe.experts.{}.w1",
        "ffn_up": "block_sparse_moe.experts.{}.w3",
        "ffn_down": "block_sparse_moe.experts.{}.w2",
    },
}
_INTERLEAVED_ROPE = {"llama", "smollm3", "granite"}  # whose rotations' pairs the writer puts side by side in q and k
_NORMS_PLUS_ONE = {"gemma", "gemma2", "gemma3"}  # the writer adds the 1 that the layer adds
_EXACT_BYTES = {Format.F16: 2.0, Format.BF16: 2.0} | {format: SIZES[kind] for format, kind in KINDS.items()}
_SHARED_GATE = "ffn_gate_inp_shexp"
_ROPE_FREQS = "rope_freqs.weight"  # read for the config, no weight of the model


def gguf_config(header: GGUFHeader, *, implementation: str = "auto") -> CheckpointConfig:
    """The config of the model in the file: bare fields for our own layers, its family's class for transformers'.

    ModelError where the family is not supported.
    """
    freqs = _read_rope_freqs(header) if _ROPE_FREQS in header.tensors else None
    config = BareConfig(**config_fields(header, freqs))
    return config if implementation != "transformers" and config.model_type in MODELS else config.of_family()


def gguf_weights(header: GGUFHeader, *, num_threads: int = 1) -> Generator[tuple[str, Tensor], None, None]:
    """(Hugging Face name, tensor) in the order of the file, or of its parts: float32, or as stored where the file has
    plain floats, and then maybe its very pages.

    One at a time, each computed by all threads: the consumer's copy is all that stays of one when the next is made.
    """
    with closing(Threads(num_threads)) as threads:
        for info, pages in _mapped(header):
            yield hugging_face_name(header, info.name), _restore(header, info, _read(pages, info, threads))


def gguf_shapes(header: GGUFHeader) -> dict[str, tuple[int, ...]]:
    """Those of what `gguf_weights` gives, by name, in order."""
    found = {}
    for info in _tensors(header):
        is_vector = _stem(info) == _SHARED_GATE
        found[hugging_face_name(header, info.name)] = (1, *info.shape) if is_vector else info.shape
    return found


def gguf_stored_weights(header: GGUFHeader) -> Generator[tuple[str, Tensor | StoredLevels], None, None]:
    """As `gguf_weights`, but matrices of blocks as they are, of which rows are read when somebody wants them."""
    for info, pages in _mapped(header):
        is_matrix = len(info.shape) == 2 and info.type in KINDS
        weight = _blocks(header, info, pages) if is_matrix else _restore(header, info, _read(pages, info))
        yield hugging_face_name(header, info.name), weight


def _mapped(header: GGUFHeader) -> Iterator[tuple[TensorInfo, mmap.mmap]]:
    """Each tensor of the model and its file's pages, which are dropped when the next one is asked for."""
    data = {file: _map(file) for file in {info.file for info in header.tensors.values()}}
    for info in _tensors(header):
        yield info, data[info.file]
        _drop(data[info.file], info)


def _tensors(header: GGUFHeader) -> Iterator[TensorInfo]:
    """The tensors of the model, each expert's matrices by themselves."""
    for info in header.tensors.values():
        match = _STACK.fullmatch(info.name)
        if info.name == _ROPE_FREQS:
            continue
        if match is None or len(info.shape) != 3:
            yield info
            continue
        num_bytes = info.num_bytes // info.shape[0]
        for expert in range(info.shape[0]):
            name, offset = f"{match[1]}.{expert}.weight", info.offset + expert * num_bytes
            yield replace(info, name=name, shape=info.shape[1:], offset=offset, num_bytes=num_bytes)


def _blocks(header: GGUFHeader, info: TensorInfo, pages: mmap.mmap) -> Blocks:
    rows, depth = info.shape
    raw = torch.frombuffer(pages, dtype=torch.uint8, offset=info.offset, count=info.num_bytes).view(rows, -1)
    return Blocks.of(_in_order(header, info, raw), info.type, (rows, depth), f"{info.file}: tensor {info.name!r}")


def gguf_exact_bytes(header: GGUFHeader) -> dict[str, float]:
    """Bytes per weight in which compiled layers keep a tensor exactly, where they can, by its Hugging Face name."""
    infos = [info for info in _tensors(header) if info.type in _EXACT_BYTES]
    return {hugging_face_name(header, info.name): _EXACT_BYTES[info.type] for info in infos}


def hugging_face_name(header: GGUFHeader, name: str) -> str:
    """The checkpoint's name of a tensor. ModelError for one that the family is not known to have."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{kind}"
    family = header.architecture
    names = _LAYER_NAMES | _FAMILY_LAYER_NAMES.get(family, {})
    of_experts = _EXPERT_NAMES | _FAMILY_EXPERT_NAMES.get(family, {})
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)(?:\.(\d+))?", stem)
    known = None if match is None else (names if match[3] is None else of_experts).get(match[2])
    if match is None or known is None:
        raise ModelError(f"{header.path}: tensor {name!r} has no counterpart in a {family} model")
    return f"model.layers.{match[1]}.{known.format(match[3])}.{kind}"


def _rope_heads(header: GGUFHeader) -> dict[str, int]:
    if header.architecture not in _INTERLEAVED_ROPE:
        return {}
    num_heads = header.integer(f"{header.architecture}.attention.head_count")
    return {"attn_q": num_heads, "attn_k": header.integer(f"{header.architecture}.attention.head_count_kv", num_heads)}


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)  # writable to torch, but never written


def _drop(data: mmap.mmap, info: TensorInfo) -> None:
    """Takes a tensor's pages out of this process; they stay in the system's cache, from which they can come again."""
    start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (info.offset + info.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):  # Linux
        data.madvise(mmap.MADV_DONTNEED, start, length)


def _read(data: mmap.mmap, info: TensorInfo, threads: Threads = ONE_THREAD) -> Tensor:
    raw = torch.frombuffer(data, dtype=torch.uint8, offset=info.offset, count=info.num_bytes)
    if info.offset % 8:
        raw = raw.clone()  # only an aligned tensor can be viewed as another type
    try:
        return dequantize(raw, info.type, info.shape, threads)
    except ValueError as error:
        raise ModelError(f"{info.file}: tensor {info.name!r}: {error}") from error


def _restore(header: GGUFHeader, info: TensorInfo, weight: Tensor) -> Tensor:
    """Undoes what the writer changed."""
    if _stem(info) == _SHARED_GATE:
        return weight.view(1, -1)  # which it writes as a vector
    if header.architecture in _NORMS_PLUS_ONE and _stem(info).endswith("norm"):
        return weight.float() - 1
    return _in_order(header, info, weight)


def _in_order(header: GGUFHeader, info: TensorInfo, rows: Tensor) -> Tensor:
    """The rows of a tensor as the checkpoint had them."""
    heads = _rope_heads(header).get(_stem(info))
    if heads is None:
        return rows
    if rows.shape[0] % (2 * heads):
        raise ModelError(f"{header.path}: {info.name!r} has {rows.shape[0]} rows for {heads} heads")
    pairs = rows.view(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _stem(info: TensorInfo) -> str:
    """The tensor's name in its layer."""
    parts = info.name.split(".")
    return parts[2] if parts[0] == "blk" else parts[0]


def _read_rope_freqs(header: GGUFHeader) -> np.ndarray:
    info = header.tensors[_ROPE_FREQS]
    freqs: np.ndarray = _read(_map(info.file), info).double().numpy()
    return freqs
