"""GGUF files written at run time, read back, and compared with the models they were written from."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Format
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
)

from engine.config import ModelConfig
from engine.loading.gguf.dequantize import dequantize
from engine.loading.gguf.header import read_gguf_header
from engine.loading.gguf.tensors import gguf_config, gguf_weights
from engine.loading.gguf.vocabulary import gguf_tokenizer
from engine.loading.loader import load_model, read_model_facts
from engine.models.model_error import ModelError
from engine.models.registry import build_model
from tests import ROOT
from tests.support.gguf_files import CONFIGS, ROPE, SHAPE, THETA, finish, make_model, state_of, write_gguf

torch.set_num_threads(1)


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
    weights = dict(gguf_weights(header))
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
    model.load_weights(gguf_weights(header))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_family_computes_what_it_did_before_it_was_a_file(tmp_path: Path, architecture: str) -> None:
    model = make_model(architecture, tied=architecture.startswith("gemma"))
    header = read_gguf_header(write_gguf(tmp_path / "m.gguf", architecture, state_of(model)))
    read = gguf_config(header, implementation="transformers")
    assert type(read) is type(model.config)
    again = AutoModelForCausalLM.from_config(read).eval()
    again.load_state_dict(dict(gguf_weights(header)), strict=not read.tie_word_embeddings)
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
    assert dict(gguf_weights(header)).keys() == state.keys()
    header = read_gguf_header(write_gguf(tmp_path / "other.gguf", "llama", state, rope_freqs=divisors * 1.1))
    with pytest.raises(ModelError, match="rope_freqs"):
        gguf_config(header)


def read_everything(path: Path) -> None:
    header = read_gguf_header(path)
    gguf_config(header)
    gguf_tokenizer(header)
    for _, weight in gguf_weights(header):
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
