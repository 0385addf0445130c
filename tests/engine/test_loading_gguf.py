"""GGUF files written at run time, read back, and compared with the models they were written from."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
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

from engine.config import ModelConfig
from engine.loading.gguf.dequantize import dequantize
from engine.loading.gguf.header import read_gguf_header
from engine.loading.gguf.tensors import gguf_config, gguf_weights
from engine.loading.gguf.vocabulary import gguf_tokenizer
from engine.loading.loader import load_model, read_model_facts
from engine.models.model_error import ModelError
from engine.models.registry import build_model

ROOT = Path(__file__).parents[2]
torch.set_num_threads(1)

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


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bound(format: Format, weight: Tensor) -> float:
    """The largest error that storing `weight` in a format may make."""
    largest, span = weight.abs().max().item(), (weight.max() - weight.min()).item()
    return {
        Format.F32: 0.0,
        Format.F16: largest * 2**-11,
        Format.BF16: largest * 2**-8,
        Format.Q8_0: largest / 127 * 0.51 + largest * 2**-10,
        Format.Q4_0: largest / 8 * 1.01,
        Format.Q4_1: span / 15 * 0.51 + largest * 2**-9,
    }[format]


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = state_of(make_model("llama", tied=True))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", state, Format.Q8_0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("format", [Format.F32, Format.F16, Format.BF16, Format.Q8_0, Format.Q4_0, Format.Q4_1])
def test_weights_come_back_within_the_bound_of_their_format(tmp_path: Path, architecture: str, format: Format) -> None:
    tied = format is Format.Q4_1
    model = make_model(architecture, tied=tied, seed=int(format))
    state = state_of(model)
    header = read_gguf_header(write_gguf(tmp_path / "m.gguf", architecture, state, format))
    weights = dict(gguf_weights(header, torch.float32))
    assert weights.keys() == state.keys()
    for name, weight in weights.items():
        limit = bound(format, state[name]) if weight.dim() == 2 else 0.0
        assert (weight - state[name]).abs().max().item() <= limit, name
    read = gguf_config(header)
    assert read.tie_word_embeddings == tied
    for field in (*SHAPE, "model_type", "architectures"):
        expected = getattr(model.config, field, None)
        assert expected is None or getattr(read, field) == pytest.approx(expected), field
    assert read.rope_parameters == pytest.approx(ROPE)


def test_our_own_layers_are_loaded_without_transformers(tiny_file: Path) -> None:
    """Importing it takes a second of the start."""
    code = f"""
import sys, torch, engine.build
from engine.config import ModelConfig
from engine.loading.loader import load_model, read_model_facts
load_model(ModelConfig(path={str(tiny_file)!r}), dtype=torch.float32, seed=0)
print("transformers" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "False\n"


def test_bare_fields_become_their_family_for_transformers_layers(tiny_file: Path) -> None:
    header = read_gguf_header(tiny_file)
    model = build_model(gguf_config(header), dtype=torch.float32, implementation="transformers")
    assert type(model.head.config) is LlamaConfig
    model.load_weights(gguf_weights(header, torch.float32))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_family_computes_what_it_did_before_it_was_a_file(tmp_path: Path, architecture: str) -> None:
    model = make_model(architecture, tied=architecture.startswith("gemma"))
    header = read_gguf_header(write_gguf(tmp_path / "m.gguf", architecture, state_of(model)))
    read = gguf_config(header, implementation="transformers")
    assert type(read) is type(model.config)
    again = AutoModelForCausalLM.from_config(read).eval()
    again.load_state_dict(dict(gguf_weights(header, torch.float32)), strict=not read.tie_word_embeddings)
    ids = torch.arange(40)[None] * 7 % SHAPE["vocab_size"]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_family_loads_into_the_engines_model(tmp_path: Path, architecture: str) -> None:
    model = make_model(architecture, tied=architecture.startswith("gemma"))
    path = write_gguf(tmp_path / "m.gguf", architecture, state_of(model), Format.F16)
    loaded = load_model(ModelConfig(path=str(path), load_format="gguf"), dtype=torch.float32, seed=0)
    assert loaded.num_parameters == model.num_parameters()
    assert loaded.architecture == type(model).__name__


@pytest.mark.parametrize("format", [Format.Q4_0, Format.Q4_1, Format.Q8_0, Format.Q5_1, Format.F16, Format.BF16])
def test_dequantized_bits_are_the_packages(format: Format) -> None:
    values = np.random.default_rng(int(format)).normal(size=(6, 128)).astype(np.float32)
    raw = gguf.quantize(values, format)
    ours = dequantize(torch.from_numpy(raw.view(np.uint8).reshape(-1)), format, values.shape)
    assert torch.equal(ours.float(), torch.from_numpy(gguf.dequantize(raw, format)))


def test_the_loaded_model_has_the_files_facts(tiny_file: Path) -> None:
    loaded = load_model(ModelConfig(path=str(tiny_file)), dtype=torch.bfloat16, seed=0)
    assert (loaded.architecture, loaded.vocab_size, loaded.trained_context) == ("LlamaForCausalLM", 320, 256)
    assert loaded.eos_token_ids == [0, 2]  # end of text, and the end of a turn that the template writes
    assert loaded.generation_defaults == {}
    assert loaded.weight_bytes == 2 * loaded.num_parameters
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("implementation", ["auto", "transformers"])
def test_ends_of_turns_and_messages_end_an_answer_too(tmp_path: Path, implementation: str) -> None:
    ends = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9, "tokenizer.ggml.fim_pre_token_id": 11}
    path = write_gguf(tmp_path / "m.gguf", "llama", state_of(make_model("llama", tied=True)), extra=ends)
    config = ModelConfig.model_validate({"path": str(path), "implementation": implementation})
    assert load_model(config, dtype=torch.float32, seed=0).eos_token_ids == [0, 2, 7, 9]


def test_a_window_that_the_format_cannot_say_is_said(tmp_path: Path) -> None:
    state = state_of(make_model("llama", tied=True))
    for name, is_said in (("mistral-7b-v0.1.Q4_0.gguf", True), ("llama-3.gguf", False)):
        facts = read_model_facts(ModelConfig(path=str(write_gguf(tmp_path / name, "llama", state))))
        assert any("sliding window" in note for note in facts.notes) is is_said


def test_the_digest_follows_the_weights_and_nothing_else(tmp_path: Path) -> None:
    def digest(seed: int, name: str) -> str:
        path = write_gguf(tmp_path / name / "m.gguf", "llama", state_of(make_model("llama", tied=True, seed=seed)))
        return load_model(ModelConfig(path=str(path)), dtype=torch.float32, seed=0).weights_digest

    for name in "abc":
        (tmp_path / name).mkdir()
    assert digest(1, "a") == digest(1, "b")
    assert digest(1, "a") != digest(2, "c")


def test_llama3_rope_is_found_from_its_divisors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": THETA,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    state = state_of(make_model("llama", tied=True))
    wavelengths = 2 * np.pi * THETA ** (np.arange(0, 32, 2) / 32)
    smooth = (8192 / wavelengths - 1.0) / 3.0  # between wavelengths of 8192 / 4 and 8192 / 1
    divisors = np.where(wavelengths < 2048, 1.0, np.where(wavelengths > 8192, 8.0, 1 / ((1 - smooth) / 8 + smooth)))
    header = read_gguf_header(write_gguf(tmp_path / "m.gguf", "llama", state, rope_freqs=divisors))
    assert gguf_config(header).rope_parameters == scaling
    assert dict(gguf_weights(header, torch.float32)).keys() == state.keys()
    header = read_gguf_header(write_gguf(tmp_path / "other.gguf", "llama", state, rope_freqs=divisors * 1.1))
    with pytest.raises(ModelError, match="rope_freqs"):
        gguf_config(header)


def read_everything(path: Path) -> None:
    header = read_gguf_header(path)
    gguf_config(header)
    gguf_tokenizer(header)
    for _, weight in gguf_weights(header, torch.float32):
        weight.sum()


def test_a_file_cut_anywhere_is_a_model_error(tiny_file: Path, tmp_path: Path) -> None:
    data, rng, cut = tiny_file.read_bytes(), random.Random(0), tmp_path / "cut.gguf"
    header = read_gguf_header(tiny_file)
    end = max(info.offset + info.num_bytes for info in header.tensors.values())
    ends = [0, 1, 3, 4, 23, 24, end - 1, *(rng.randrange(end) for _ in range(100))]
    ends += [rng.randrange(header.data_start) for _ in range(100)]
    for size in ends:
        cut.write_bytes(data[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            read_everything(cut)


def test_damaged_bytes_raise_nothing_but_model_errors(tiny_file: Path, tmp_path: Path) -> None:
    data, rng, path = tiny_file.read_bytes(), random.Random(0), tmp_path / "damaged.gguf"
    data_start, num_refused = read_gguf_header(tiny_file).data_start, 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 8])):
            damaged[rng.randrange(data_start)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_everything(path)
        except ModelError:
            num_refused += 1
    assert num_refused > 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(100), "does not start with 'GGUF'"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(100), "version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(100), "little-endian"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 100, "announces"),
    ],
)
def test_a_foreign_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "foreign.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        load_model(ModelConfig(path=str(path)), dtype=torch.float32, seed=0)


def test_a_family_that_is_not_supported_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "bloom")
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), dtype=np.float32))
    finish(writer)
    with pytest.raises(ModelError, match=r"'bloom'.*safetensors"):
        load_model(ModelConfig(path=str(tmp_path / "m.gguf")), dtype=torch.float32, seed=0)


def test_a_header_that_contradicts_its_tensors_is_refused(tiny_file: Path, tmp_path: Path) -> None:
    data, key = tiny_file.read_bytes(), b"llama.feed_forward_length"
    position = data.index(key) + len(key) + 4  # behind the type
    path = tmp_path / "m.gguf"
    path.write_bytes(data[:position] + (2**20 - 1).to_bytes(4, "little") + data[position + 4 :])
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_down\.weight is \(64, 96\)"):
        load_model(ModelConfig(path=str(path)), dtype=torch.float32, seed=0)
