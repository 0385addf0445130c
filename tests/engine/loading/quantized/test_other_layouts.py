"""compressed-tensors, FP8, ModelOpt and bitsandbytes: every weight as an independent dequantiser has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support import quantizers as q
from tests.support.loaded_models import kept_as, load_compiled, load_plain, plan_of, weights_of
from tests.support.quantized_files import write_checkpoint
from tests.support.quantizers import Quantize

LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
NVFP4 = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8"}


@pytest.fixture(autouse=True)
def _reproducible(one_thread_and_seed: None) -> None:
    """Every test begins with the same seed."""


def compressed(bits: int = 8, kind: str = "int", **weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, **weights}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def fp8(**fields: object) -> dict[str, object]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **fields}


def kept_integers(bits: int, symmetric: bool) -> str:
    if bits < 4 or (bits == 4 and symmetric):
        return "Q4_0"
    if bits == 4:
        return "int4 with zero points"
    if bits == 5:
        return "Q5_0" if symmetric else "int6"
    if bits == 6 and symmetric:
        return "int6"
    return "int8" if bits < 8 or symmetric else "int8 with zero points"


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BLOCK = (128, 128)
CASES: dict[str, tuple[Quantize, dict[str, object], str]] = {
    **{
        f"packed, {bits} bits{', padded' if padded else ''}{'' if symmetric else ', zero points'}": (
            q.compressed_integers(bits, padded=padded, symmetric=symmetric),
            compressed(bits),
            kept_integers(bits, symmetric),
        )
        for bits in range(2, 9)
        for padded in (False, True)
        for symmetric in (True, False)
        if not padded or 32 % bits
    },
    "packed, groups of 128": (q.compressed_integers(4, group_size=128), compressed(4), "Q4_0"),
    "packed, a scale for each output": (q.compressed_integers(4, group_size=-1), compressed(4), "Q4_0"),
    "packed, activation order": (q.compressed_integers(4, ordered=True), compressed(4), "Q4_0"),
    "integers": (q.eight_bit_integers(), compressed(), "int8"),
    "integers, one scale": (q.eight_bit_integers(scales="matrix"), compressed(), "int8"),
    "integers, groups": (q.eight_bit_integers(scales="groups"), compressed(), "int8"),
    "integers, zero points": (q.eight_bit_integers(symmetric=False), compressed(), "int8 with zero points"),
    "integers, zero points of groups": (
        q.eight_bit_integers(symmetric=False, scales="groups"), compressed(), "int8 with zero points",
    ),
    "floats": (q.eight_bit_floats(), compressed(kind="float"), "FP8"),
    "floats, a scale for each output": (q.eight_bit_floats(rows=True), compressed(kind="float"), "FP8"),
    "floats, blocks": (
        q.eight_bit_floats(block=(48, 64)), compressed(kind="float", block_structure=[48, 64]), "FP8",
    ),
    "floats, blocks that cut groups of 32": (
        q.eight_bit_floats(block=(48, 48)), compressed(kind="float", block_structure=[48, 48]), "float16",
    ),
    "mxfp8": (q.eight_bit_floats(block=(1, 32), exponents=True), compressed(kind="float"), "FP8"),
    "mxfp4": (q.mxfp4, compressed(4, "float"), "MXFP4"),
    "nvfp4": (q.nvfp4(), compressed(4, "float"), "NVFP4"),
    "FP8": (q.eight_bit_floats(), fp8(), "FP8"),
    "FP8, a scale for each output": (q.eight_bit_floats(rows=True), {"quant_method": "fbgemm_fp8"}, "FP8"),
    "FP8, blocks": (
        q.eight_bit_floats(block=BLOCK, name="weight_scale_inv"), fp8(weight_block_size=[128, 128]), "FP8",
    ),
    "ModelOpt FP8": (q.eight_bit_floats(), {"quant_method": "modelopt", "quant_algo": "FP8"}, "FP8"),
    "ModelOpt NVFP4": (q.nvfp4(of_modelopt=True), {"quant_method": "modelopt", **NVFP4}, "NVFP4"),
    "bitsandbytes nf4": (q.book_of_four_bits(), BNB, "nf4"),
    "bitsandbytes fp4": (q.book_of_four_bits("fp4"), BNB, "fp4"),
    "bitsandbytes, nested": (q.book_of_four_bits(nested=True), BNB, "nf4"),
    "bitsandbytes, fp4 nested": (q.book_of_four_bits("fp4", nested=True), BNB, "fp4"),
    "bitsandbytes, another book": (q.book_of_four_bits(is_own=True), BNB, "float16"),
    "bitsandbytes int8": (q.bitsandbytes_integers, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
}  # fmt: skip
ROUNDED = {  # how far, relative to each weight
    "bitsandbytes int8": 2**-11,  # scales in float32
    "bitsandbytes nf4": 2**-11,
    "bitsandbytes, nested": 2**-11,
    "bitsandbytes fp4": 2**-21,
    "bitsandbytes, fp4 nested": 2**-21,
}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_what_the_file_says(tmp_path: Path, name: str) -> None:
    quantize, quantization, kept = CASES[name]
    expected = write_checkpoint(tmp_path, quantize, quantization, dtype=torch.bfloat16)
    model = load_compiled(tmp_path)
    assert {kept_as(model)[layer].split(",")[0] for layer in LAYERS} == {kept}
    found = weights_of(model)
    if kept == "float16":
        assert all(torch.equal(found[key].half(), weight.half()) for key, weight in expected.items())
    elif name in ROUNDED:
        bound = ROUNDED[name]
        assert all(bool(((found[key] - w).abs() <= w.abs() * bound).all()) for key, w in expected.items())
    else:
        assert_same(found, expected)


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case[2] in ("float16", "FP8") or name in ROUNDED]
)
def test_nothing_is_rounded_where_that_is_asked_for(tmp_path: Path, name: str) -> None:
    expected = write_checkpoint(tmp_path, *CASES[name][:2], dtype=torch.bfloat16)
    assert_same(weights_of(load_compiled(tmp_path, quantization="none")), expected)
    assert_same(weights_of(load_plain(tmp_path)), expected)


def test_formats_may_be_mixed(tmp_path: Path) -> None:
    parts = {
        "layers.0.self_attn": q.compressed_integers(4),
        "layers.0.mlp": q.eight_bit_floats(rows=True),
        "layers.1.self_attn": q.eight_bit_integers(),
        "layers.1.mlp.down_proj": q.nvfp4(),
        "layers.1.mlp.up_proj": q.compressed_integers(8, group_size=128),
    }
    groups = {
        f"group_{i}": {"targets": ["re:.*"], "weights": {"num_bits": bits, "type": kind}, "format": "any"}
        for i, (bits, kind) in enumerate([(4, "int"), (8, "float"), (8, "int"), (4, "float")])
    }
    config = {"quant_method": "compressed-tensors", "config_groups": groups, "format": "mixed-precision"}
    expected = write_checkpoint(tmp_path, parts, config, dtype=torch.bfloat16)
    model = load_compiled(tmp_path, quantization="none")
    assert_same(weights_of(model), expected)
    notes = "\n".join(plan_of(tmp_path).notes)
    for part in ("4 bits", "8-bit floats", "8 bits", "nvfp4", "q_proj", "down_proj", "kept as Q4_0", "kept as FP8"):
        assert part in notes


def test_modelopts_own_file_says_it_too_and_scales_of_activations_are_left(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.q_proj.input_scale": torch.tensor(0.1),
        "model.layers.0.self_attn.k_proj.k_scale": torch.tensor(0.1),
        "model.layers.1.mlp.up_proj.input_scale": torch.tensor(0.1),
    }
    expected = write_checkpoint(tmp_path, q.eight_bit_floats(), None, dtype=torch.bfloat16, extra=extra)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert_same(weights_of(load_plain(tmp_path)), expected)
    assert any("activations keep 16 bits" in note for note in plan_of(tmp_path).notes)


def test_an_output_layer_may_be_quantised_and_an_embedding_shared(tmp_path: Path) -> None:
    parts = {"_proj": q.compressed_integers(4), "lm_head": q.compressed_integers(8)}
    groups = {"a": {"weights": {"num_bits": 4, "type": "int"}}, "b": {"weights": {"num_bits": 8, "type": "int"}}}
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    expected = write_checkpoint(tmp_path, parts, config, dtype=torch.bfloat16)
    model = load_compiled(tmp_path)
    assert kept_as(model)["lm_head"].startswith("int8, stored as compressed-tensors, 8 bits")
    assert_same(weights_of(model), expected)
    tied = tmp_path / "tied"
    expected = write_checkpoint(
        tied, q.compressed_integers(4), compressed(4), dtype=torch.bfloat16, changes={"tie_word_embeddings": True}
    )
    found = weights_of(load_compiled(tied))
    assert torch.equal(found.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert_same(found, expected)
