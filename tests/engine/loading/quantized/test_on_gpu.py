"""Quantised checkpoints under Triton's kernels: codes stay codes up to the product, and every weight the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.loading.loader import load_model
from engine.models.model import Model
from engine.planning.engine_plan import render_plan
from engine.quantization.linear import Linear
from engine.runner.kernel_backend import KernelBackend
from tests.support import quantizers as q
from tests.support.loaded_models import kept_as, plan_of, weights_of
from tests.support.quantized_files import write_checkpoint
from tests.support.quantizers import Quantize

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter was not chosen before its import"),
    pytest.mark.usefixtures("one_thread_and_seed"),
]
LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def gptq(bits: int, group_size: int = 32, **fields: object) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": True, **fields}


def compressed(bits: int, kind: str = "int") -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
CASES: dict[str, tuple[Quantize, dict[str, object], str]] = {
    "GPTQ": (q.gptq(4), gptq(4), "int4, groups of 32"),
    "GPTQ, groups of 128": (q.gptq(4, group_size=128), gptq(4, 128), "int4"),
    "GPTQ, activation order": (q.gptq(4, order="shuffled"), gptq(4, desc_act=True), "int4, groups of 32"),
    "GPTQ, an order for each layer": (q.gptq(4, order="own"), gptq(4, desc_act=True), ""),
    "GPTQ, zero points": (q.gptq(4, symmetric=False), gptq(4, sym=False), "int4, groups of 32"),
    "GPTQ, 3 bits, zero points": (q.gptq(3, symmetric=False), gptq(3, sym=False), "int3, groups of 32"),
    "GPTQ, 8 bits": (q.gptq(8), gptq(8), "int8, groups of 32"),
    "AWQ": (q.awq(), AWQ, "int4, groups of 32"),
    "packed, 5 bits": (q.compressed_integers(5), compressed(5), "int5, groups of 32"),
    "packed, 6 bits, zero points": (q.compressed_integers(6, symmetric=False), compressed(6), "int6, groups of 32"),
    "packed, rows": (q.compressed_integers(4, group_size=-1), compressed(4), "int4, rows"),
    "MXFP4": (q.mxfp4, compressed(4, "float"), "fp4, groups of 32"),
    "NVFP4": (q.nvfp4(), compressed(4, "float"), "fp4, groups of 16"),
    "FP8": (q.eight_bit_floats(), {"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8, rows"),
}


def load(path: Path, **settings: str) -> Model:
    plan = plan_of(path, kernels="triton", dtype="float32", **settings)
    methods = KernelBackend(plan, is_strict=False).linear_methods
    return load_model(plan.model_config, dtype=plan.dtype, seed=0, methods=methods).model


@pytest.mark.parametrize("name", CASES)
def test_codes_stay_codes_and_every_weight_is_the_same(tmp_path: Path, name: str) -> None:
    quantize, quantization, kept = CASES[name]
    expected = write_checkpoint(tmp_path, quantize, quantization)
    model = load(tmp_path, quantization="stored")
    described = kept_as(model)
    assert all(described[layer].startswith(kept) for layer in LAYERS), described
    assert described["lm_head"] == "float32"
    found = weights_of(model)
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-6, atol=0)
    layer = model.get_submodule("layers.0.self_attn.qkv_proj")
    assert isinstance(layer, Linear)
    x = torch.randn(2, layer.in_features)
    torch.testing.assert_close(layer(x), x @ layer.dense().T, rtol=1e-3, atol=1e-3)


def test_fewer_bits_are_rounded_to_and_as_many_are_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, q.gptq(8), gptq(8))
    assert kept_as(load(tmp_path, quantization="int4"))["o_proj"].startswith("int4, groups of 32")
    expected = write_checkpoint(tmp_path, q.gptq(4), gptq(4))
    model = load(tmp_path, quantization="int8")
    assert kept_as(model)["o_proj"].startswith("int4, groups of 32")
    assert kept_as(model)["lm_head"].startswith("int8, ")
    assert torch.equal(
        weights_of(model)["model.layers.0.mlp.up_proj.weight"], expected["model.layers.0.mlp.up_proj.weight"]
    )


def test_a_plan_keeps_what_is_quantised_by_itself_and_says_the_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, q.gptq(4), gptq(4))
    plan, floats = (plan_of(tmp_path, kernels="triton", quantization=name) for name in ("auto", "none"))
    assert plan.quantization == "stored"
    assert "integers, FP8 and FP4 of up to 8 bits stay as they are" in render_plan(plan)
    output = plan.facts.vocab_size * plan.facts.hidden_size
    in_layers = plan.facts.num_linear_parameters - output
    size = plan.dtype.itemsize
    assert floats.linear_bytes == (in_layers + output) * size
    assert in_layers * 0.5 + output * size < plan.linear_bytes <= in_layers * 0.7 + output * size
