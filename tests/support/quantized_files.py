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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def float_state(**changes: object) -> tuple[LlamaConfig, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **changes}, architectures=["LlamaForCausalLM"])
    with torch.no_grad():
        state = {name: tensor.clone() for name, tensor in LlamaForCausalLM(config).state_dict().items()}
        state["model.embed_tokens.weight"].normal_()
        state["lm_head.weight"].normal_(std=0.2)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return config, {name: tensor.half().float() for name, tensor in state.items()}


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
    config, state = float_state(**(changes or {}))
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
    config.save_pretrained(directory)
    fields = json.loads((directory / "config.json").read_text())
    if quantization is not None:
        fields["quantization_config"] = dict(quantization)
    (directory / "config.json").write_text(json.dumps(fields))
    _save(tensors, directory, max_bytes)
    write_tokenizer(directory)
    return state


def write_random_gptq(directory: Path, config: LlamaConfig, *, group_size: int = 128) -> None:
    """A GPTQ checkpoint of 4 bits without zero points whose integers are noise: large ones are made in no time."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).state_dict().items()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True}
    (directory / "config.json").write_text(json.dumps(fields))
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
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
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
