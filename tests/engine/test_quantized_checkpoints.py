"""Whole engines on quantised checkpoints: they answer as engines on the floats that those stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from engine.build import build_engine
from engine.config import EngineConfig
from engine.types import Request, SamplingParams
from tests.support import quantizers as q
from tests.support.quantized_files import OLMOE, write_checkpoint, write_floats
from tests.support.quantizers import Quantize

NUM_TOKENS = 12
PROMPTS = ([5, 6, 7], list(range(20, 60)), [200, 3, 150, 9])
GROUPS = {"a": {"weights": {"num_bits": 4, "type": "int"}, "targets": ["Linear"]}}
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": GROUPS}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
CASES: dict[str, tuple[Quantize | dict[str, Quantize], dict[str, object]]] = {
    "GPTQ": (q.gptq(4), GPTQ),
    "GPTQ, activation order": (q.gptq(4, order="shuffled", group_size=64), GPTQ | {"group_size": 64, "desc_act": True}),
    "GPTQ, 8 bits, activation order": (q.gptq(8, order="shuffled"), GPTQ | {"bits": 8}),
    "AWQ": (q.awq(), {"quant_method": "awq", "bits": 4, "group_size": 32}),
    "compressed-tensors": (q.compressed_integers(4), COMPRESSED),
    "compressed-tensors, the embedding too": (
        {"_proj": q.compressed_integers(4), "embed_tokens": q.compressed_integers(4, symmetric=False)},
        COMPRESSED,
    ),
    "compressed-tensors, 8 bits": (q.eight_bit_integers(), COMPRESSED),
    "FP8": (q.eight_bit_floats(rows=True), {"quant_method": "fp8"}),
    "mxfp4": (q.mxfp4, COMPRESSED),
    "ModelOpt, nvfp4": (q.nvfp4(of_modelopt=True), {"quant_method": "modelopt"}),
    "FP8, blocks": (q.eight_bit_floats(block=(128, 128), name="weight_scale_inv"), {"quant_method": "fp8"}),
    "compressed-tensors, 8 bits and zero points": (q.eight_bit_integers(symmetric=False, scales="groups"), COMPRESSED),
    "GPTQ, 8 bits and zero points": (q.gptq(8, symmetric=False), GPTQ | {"bits": 8, "sym": False}),
    "bitsandbytes, nf4": (q.book_of_four_bits(nested=True), {"quant_method": "bitsandbytes"}),
    "bitsandbytes, fp4": (q.book_of_four_bits("fp4"), {"quant_method": "bitsandbytes"}),
    "bitsandbytes, 8 bits": (q.bitsandbytes_integers, {"quant_method": "bitsandbytes"}),
}


@pytest.fixture(autouse=True)
def _reproducible(one_thread_and_seed: None) -> None:
    """Every test begins with the same seed."""


class Answers(NamedTuple):
    tokens: list[list[int]]  # greedy, of each prompt
    weights: dict[str, dict[str, int]]  # how they are kept
    notes: list[str]  # of the start


def answers(path: Path, *, kernels: str = "auto", **model: str) -> Answers:
    notes: list[str] = []
    device = {"name": "cpu", "num_threads": 1, "kernels": kernels}
    config = EngineConfig.model_validate({"model": {"path": str(path), **model}, "device": device})
    engine, info = build_engine(config, lambda phase, detail: notes.append(f"{phase}: {detail}"))
    for number, prompt in enumerate(PROMPTS):
        params = SamplingParams(seed=0, max_tokens=NUM_TOKENS, temperature=0.0)
        engine.add(Request(request_id=str(number), prompt_token_ids=list(prompt), params=params))
    found: list[list[int]] = [[] for _ in PROMPTS]
    while engine.has_work:
        for output in engine.step()[0]:
            assert output.error is None
            found[int(output.request_id)] += output.token_ids
    return Answers(found, info.weights, notes)


def tokens_of_floats(
    directory: Path, state: dict[str, Tensor], *, kernels: str = "auto", **changes: object
) -> list[list[int]]:
    """What the same model of floats answers, in compiled layers that round nothing, or in others."""
    write_floats(directory, state, **changes)
    return answers(directory, kernels=kernels, dtype="float32").tokens


@pytest.mark.parametrize("name", CASES)
def test_a_quantised_checkpoint_answers_as_its_floats_do(tmp_path: Path, name: str) -> None:
    state = write_checkpoint(tmp_path / "quantized", *CASES[name])
    expected = tokens_of_floats(tmp_path / "floats", state)
    found = answers(tmp_path / "quantized")
    assert found.tokens == expected
    assert [len(tokens) for tokens in expected] == [NUM_TOKENS] * len(PROMPTS)
    for layer in ("layers.self_attn.qkv_proj", "layers.mlp.down_proj"):
        assert ["stored as " in kept for kept in found.weights[layer]] == [True]
    assert any(note.startswith("note: stored as ") and "q_proj (2)" in note for note in found.notes)


EXPERTS: dict[str, tuple[Quantize | dict[str, Quantize], dict[str, object]]] = {
    "GPTQ": (q.gptq(4), GPTQ),
    "GPTQ, an order for each matrix": (q.gptq(4, order="own"), GPTQ | {"desc_act": True}),
    "AWQ": CASES["AWQ"],
    "FP8": (q.eight_bit_floats(rows=True), {"quant_method": "fp8"}),
    "mxfp4": CASES["mxfp4"],
    "nf4": (q.book_of_four_bits(), {"quant_method": "bitsandbytes"}),
    "formats of their own": (
        {
            "experts.1.down_proj": q.compressed_integers(8),
            "experts.2": q.eight_bit_floats(rows=True),
            "up_proj": q.compressed_integers(4, symmetric=False),
            "experts": q.compressed_integers(4),
        },
        COMPRESSED | {"config_groups": GROUPS | {"b": {"weights": {"num_bits": 8, "type": "int"}}}},
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_quantised_experts_answer_as_torchs_of_floats_do(tmp_path: Path, name: str) -> None:
    state = write_checkpoint(tmp_path / "quantized", *EXPERTS[name], changes=OLMOE)
    expected = tokens_of_floats(tmp_path / "floats", state, kernels="torch", **OLMOE)
    found = answers(tmp_path / "quantized")
    assert found.tokens == expected
    assert ["stored as " in kept for kept in found.weights["layers.mlp.experts.gate_up_proj"]] == [True]
    assert any(note.startswith("note: stored as ") and "experts.up_proj" in note for note in found.notes)


def test_rows_of_8_bit_activations_meet_columns_in_activation_order(tmp_path: Path) -> None:
    state = write_checkpoint(tmp_path / "quantized", *CASES["GPTQ, activation order"])
    expected = tokens_of_floats(tmp_path / "floats", state)
    found = answers(tmp_path / "quantized", activations="int8")
    assert "by activations of 8 bits" in next(iter(found.weights["layers.mlp.down_proj"]))
    agreed = [a[0] == b[0] for a, b in zip(found.tokens, expected, strict=True)]
    assert sum(agreed) >= 2  # it rounds


def test_torchs_layers_answer_the_same(tmp_path: Path) -> None:
    state = write_checkpoint(tmp_path / "quantized", *CASES["GPTQ, activation order"])
    found = answers(tmp_path / "quantized", kernels="torch", dtype="float32")
    assert found.tokens == tokens_of_floats(tmp_path / "floats", state)
    assert any("torch layers read no stored integers" in note for note in found.notes)


def test_random_weights_need_no_quantised_files(tmp_path: Path) -> None:
    """A config alone is enough to try a model's shape."""
    write_checkpoint(tmp_path, *CASES["GPTQ"])
    (tmp_path / "model.safetensors").unlink()
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["bits"] == 4
    found = answers(tmp_path, load_format="dummy")
    assert [len(tokens) for tokens in found.tokens] == [NUM_TOKENS] * len(PROMPTS)
