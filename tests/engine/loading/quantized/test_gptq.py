"""GPTQ's and AWQ's checkpoints: every weight as an independent dequantiser has it, kept as integers where they fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from engine.models.model_error import ModelError
from engine.models.registry import build_model
from tests.support.loaded_models import kept_as, load_compiled, load_plain, plan_of, weights_of
from tests.support.quantized_files import SIZES, write_checkpoint, write_tokenizer
from tests.support.quantizers import Quantize, awq, gptq

LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@pytest.fixture(autouse=True)
def _reproducible(one_thread_and_seed: None) -> None:
    """Every test begins with the same seed."""


def config(bits: int, group_size: int = 32, **fields: object) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": True, **fields}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


V2 = {"checkpoint_format": "gptq_v2"}
ZEROS = "int4 with zero points"
CASES: dict[str, tuple[Quantize, dict[str, object], str]] = {
    "4 bits": (gptq(4), config(4), "Q4_0"),
    "4 bits, groups of 64": (gptq(4, group_size=64), config(4, 64), "Q4_0"),
    "4 bits, groups of 128": (gptq(4, group_size=128), config(4, 128), "Q4_0"),
    "4 bits, one group": (gptq(4, group_size=-1), config(4, -1), "Q4_0"),
    "4 bits, with an index": (gptq(4, order="even"), config(4), "Q4_0"),
    "4 bits, activation order": (gptq(4, order="shuffled"), config(4, desc_act=True), "Q4_0"),
    "4 bits, activation order, v2": (gptq(4, version=2, order="shuffled"), config(4, desc_act=True, **V2), "Q4_0"),
    "4 bits, v2": (gptq(4, version=2), config(4, **V2), "Q4_0"),
    "4 bits, zero points": (gptq(4, symmetric=False), config(4, sym=False), ZEROS),
    "4 bits, zero points, v2": (gptq(4, symmetric=False, version=2), config(4, sym=False, **V2), ZEROS),
    "2 bits": (gptq(2), config(2), "Q4_0"),
    "2 bits, zero points": (gptq(2, symmetric=False), config(2, sym=False), "Q4_0"),
    "3 bits": (gptq(3), config(3), "Q4_0"),
    "3 bits, zero points": (gptq(3, symmetric=False), config(3, sym=False), "Q4_0"),
    "3 bits, zero points, v2": (gptq(3, symmetric=False, version=2), config(3, sym=False, **V2), "Q4_0"),
    "an order for each layer": (gptq(4, order="own"), config(4, desc_act=True), "Q4_0"),
    "8 bits": (gptq(8), config(8), "int8"),
    "8 bits, zero points": (gptq(8, symmetric=False), config(8, sym=False), "int8 with zero points"),
    "8 bits, zero points, v2": (
        gptq(8, symmetric=False, version=2),
        config(8, sym=False, **V2),
        "int8 with zero points",
    ),
    "8 bits, activation order": (gptq(8, order="shuffled"), config(8, desc_act=True), "int8"),
    "AutoRound": (
        gptq(4),
        {**config(4), "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        "Q4_0",
    ),
    "AWQ": (awq(), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, ZEROS),
    "AWQ, 3 bits": (awq(3), {"quant_method": "awq", "bits": 3, "group_size": 32}, "Q4_0"),
    "AWQ, 5 bits": (awq(5), {"quant_method": "awq", "bits": 5, "group_size": 32}, "int6"),
    "AWQ, groups of 128": (awq(group_size=128), {"quant_method": "awq", "w_bit": 4, "q_group_size": 128}, ZEROS),
}


@pytest.mark.parametrize("name", CASES)
def test_integers_stay_integers_and_every_weight_is_exact(tmp_path: Path, name: str) -> None:
    quantize, quantization, kept = CASES[name]
    expected = write_checkpoint(tmp_path, quantize, quantization)
    model = load_compiled(tmp_path)
    assert {kept_as(model)[layer].split(",")[0] for layer in LAYERS} == {kept}
    assert_same(weights_of(model), expected)


NOT_INTEGERS: dict[str, tuple[Quantize, dict[str, object]]] = {
    "groups of 16": (gptq(4, group_size=16), config(4, 16)),
}


@pytest.mark.parametrize("name", NOT_INTEGERS)
def test_what_no_integer_format_holds_becomes_floats(tmp_path: Path, name: str) -> None:
    expected = write_checkpoint(tmp_path, *NOT_INTEGERS[name])
    model = load_compiled(tmp_path)
    assert {kept_as(model)[layer].split(",")[0] for layer in LAYERS} == {"float16"}
    found = weights_of(model)
    for key, weight in expected.items():
        assert torch.equal(found[key].half(), weight.half()), key
    assert_same(weights_of(load_compiled(tmp_path, quantization="none")), expected)


def test_scales_that_float16_does_not_hold_are_rounded_unless_nothing_may_be(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path, gptq(4, scale_dtype=np.float32), config(4))
    model = load_compiled(tmp_path)
    assert kept_as(model)["o_proj"].startswith("Q4_0")
    for key, weight in weights_of(model).items():
        assert ((weight - expected[key]).abs() <= expected[key].abs() * 2**-11).all(), key
    assert_same(weights_of(load_compiled(tmp_path, quantization="none")), expected)


@pytest.mark.parametrize("name", ["4 bits, activation order", "3 bits, zero points", "AWQ"])
def test_torchs_layers_get_the_same_weights(tmp_path: Path, name: str) -> None:
    expected = write_checkpoint(tmp_path, CASES[name][0], CASES[name][1])
    assert_same(weights_of(load_plain(tmp_path)), expected)
    assert_same(weights_of(load_plain(tmp_path, implementation="transformers")), expected)


@pytest.mark.parametrize("file", ["quantize_config.json", "none"])
def test_old_directories_say_it_in_a_file_of_their_own_or_nowhere(tmp_path: Path, file: str) -> None:
    expected = write_checkpoint(tmp_path, gptq(4, order="shuffled"), None)
    if file != "none":
        (tmp_path / file).write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": True, "damp_percent": 0.01}))
    model = load_compiled(tmp_path)
    assert kept_as(model)["o_proj"].startswith("Q4_0")
    assert_same(weights_of(model), expected)


def test_awq_is_told_from_gptq_without_a_config(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path, awq(), None)
    assert_same(weights_of(load_compiled(tmp_path)), expected)


def test_layers_may_differ_and_some_may_be_floats(tmp_path: Path) -> None:
    parts = {"layers.0.self_attn": gptq(4), "layers.0.mlp.up_proj": gptq(8), "layers.1.mlp": gptq(2, group_size=64)}
    dynamic = {r"+:.*mlp.*": {"bits": 8}, r"-:.*o_proj": {}}
    expected = write_checkpoint(tmp_path, parts, config(4, dynamic=dynamic))
    model = load_compiled(tmp_path)
    assert_same(weights_of(model), expected)
    found = kept_as(model, layer=0)
    assert found["qkv_proj"].startswith("Q4_0")
    assert found["gate_up_proj"].startswith("float16 + int8")
    assert kept_as(model, layer=1)["down_proj"] == "Q4_0, stored as GPTQ, 2 bits, groups of 64"


def test_parts_of_one_matrix_may_differ(tmp_path: Path) -> None:
    parts = {
        "q_proj": gptq(4),
        "k_proj": gptq(3),
        "v_proj": gptq(8),
        "gate_proj": gptq(2),
        "up_proj": gptq(4, group_size=64),
    }
    expected = write_checkpoint(tmp_path, parts, config(4, dynamic={"+:.*": {}}))
    model = load_compiled(tmp_path)
    assert kept_as(model)["qkv_proj"].startswith("Q4_0 + int8, stored as GPTQ, 4 bits")
    assert kept_as(model)["gate_up_proj"].startswith("Q4_0")
    assert_same(weights_of(model), expected)


def test_tensors_of_a_matrix_may_lie_in_several_files(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path, gptq(4), config(4), max_bytes=10_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 10
    assert_same(weights_of(load_compiled(tmp_path)), expected)


def test_biases_of_zeros_that_old_quantisers_wrote_are_left_out(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    expected = write_checkpoint(tmp_path, gptq(4), config(4), extra={name: torch.zeros(128)})
    assert_same(weights_of(load_compiled(tmp_path)), expected)
    write_checkpoint(tmp_path, gptq(4), config(4), extra={name: torch.ones(128)})
    with pytest.raises(ModelError, match=r"not part of the model \(.*q_proj\.bias"):
        load_compiled(tmp_path)


def test_experts_become_floats_one_after_the_other(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    family = Qwen3MoeConfig(**SIZES | sizes, architectures=["Qwen3MoeForCausalLM"])
    family.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": config(4)}))
    write_tokenizer(tmp_path)
    tensors, expected = {}, {}
    with torch.device("meta"):
        shapes = build_model(family, dtype=torch.float32).stored_shapes()
    for name, shape in shapes.items():
        if not name.endswith("_proj.weight"):
            tensors[name] = expected[name] = torch.randn(shape).half().float()
            continue
        layer = name.removesuffix(".weight")
        found, dense = gptq(4)(layer, *shape)
        tensors |= {f"{layer}.{key}": tensor for key, tensor in found.items()}
        expected[name] = torch.from_numpy(dense.astype(np.float32))
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(weights_of(load_plain(tmp_path)), expected)


def test_an_index_that_was_never_filled_in_means_neighbours(tmp_path: Path) -> None:
    def quantize(name: str, num_rows: int, depth: int):
        tensors, dense = gptq(4, order="even")(name, num_rows, depth)
        return tensors | {"g_idx": torch.zeros(depth, dtype=torch.int32)}, dense

    expected = write_checkpoint(tmp_path, quantize, config(4))
    assert_same(weights_of(load_compiled(tmp_path)), expected)


def test_the_first_versions_zero_points_borrow_from_their_neighbours(tmp_path: Path) -> None:
    """Of a word, 1 in each field was subtracted as from one number: where a zero point is 0, the next one pays."""

    def quantize(name: str, num_rows: int, depth: int):
        tensors, _ = gptq(4, version=2, symmetric=False)(name, num_rows, depth)
        tensors["qzeros"] = torch.randint(0, 1 << 31, tensors["qzeros"].shape, dtype=torch.int64).to(torch.int32)
        second = {**tensors}
        first = tensors["qzeros"].numpy().view(np.uint32) - np.uint32(0x11111111)
        tensors["qzeros"] = torch.from_numpy(first.view(np.int32).copy())
        words = second["qzeros"].numpy().view(np.uint32)
        zeros = np.stack([words >> np.uint32(4 * i) & np.uint32(15) for i in range(8)], -1).reshape(-1, num_rows)
        assert (zeros == 0).any()
        packed = tensors["qweight"].numpy().view(np.uint32)
        q = np.stack([packed >> np.uint32(4 * i) & np.uint32(15) for i in range(8)], 1).reshape(depth, num_rows)
        index = np.arange(depth) // 32
        dense = (q.astype(np.int64) - zeros[index]) * tensors["scales"].numpy().astype(np.float64)[index]
        return tensors, dense.T

    expected = write_checkpoint(tmp_path, quantize, config(4, sym=False))
    assert_same(weights_of(load_compiled(tmp_path)), expected)


@pytest.mark.parametrize("name", ["4 bits", "4 bits, zero points", "8 bits, zero points", "8 bits", "AWQ"])
@pytest.mark.parametrize("quantization", ["auto", "none", "int8"])
def test_the_plan_knows_what_stays(tmp_path: Path, name: str, quantization: str) -> None:
    write_checkpoint(tmp_path, CASES[name][0], CASES[name][1])
    plan = plan_of(tmp_path, quantization=quantization)
    model = load_compiled(tmp_path, quantization=quantization)
    packed = [module.weight for module in model.modules() if hasattr(module, "stored_as") and not module.is_plain]
    assert sum(matrix.num_bytes for matrix in packed) == plan.linear_bytes
