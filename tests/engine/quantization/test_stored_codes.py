"""A checkpoint's codes on a GPU: as they are where kernels multiply them, and floats elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.loading.quantized.checkpoint import read_quantized
from engine.loading.quantized.scheme import Scheme
from engine.loading.stored_weights import read_stored_weights
from engine.quantization.linear import Linear, LinearSpec, Part
from engine.quantization.triton_gpu import QuantizedMethod
from tests.support import quantizers as q
from tests.support.quantizers import Quantize

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter was not chosen before its import"),
    pytest.mark.usefixtures("one_thread_and_seed"),
]
PARTS = (Part("q_proj", 128), Part("k_proj", 128))


def packed(bits: int) -> tuple[str, dict[str, object]]:
    return "compressed-tensors", {"config_groups": {"a": {"weights": {"num_bits": bits, "type": "int"}}}}


GPTQ = ("gptq", {"group_size": 32})
CASES: dict[str, tuple[Quantize, tuple[str, dict[str, object]], str]] = {
    "GPTQ": (q.gptq(4), GPTQ, "int4, groups of 32"),
    "GPTQ, zero points": (q.gptq(4, symmetric=False), GPTQ, "int4, groups of 32"),
    "GPTQ, activation order": (q.gptq(4, order="shuffled"), GPTQ, "int4, groups of 32"),
    "GPTQ, 3 bits": (q.gptq(3, symmetric=False), GPTQ, "int3, groups of 32"),
    "GPTQ, 8 bits, zero points": (q.gptq(8, symmetric=False), GPTQ, "int8, groups of 32"),
    "GPTQ, groups of 16": (q.gptq(4, group_size=16), ("gptq", {"group_size": 16}), "int4, groups of 16"),
    "GPTQ, one group": (q.gptq(4, group_size=-1), ("gptq", {"group_size": -1}), "int4, rows"),
    "AWQ": (q.awq(group_size=128), ("awq", {"group_size": 128}), "int4, groups of 128"),
    "packed, 6 bits": (q.compressed_integers(6, symmetric=False), packed(6), "int6, groups of 32"),
    "integers": (q.eight_bit_integers(), packed(8), "int8, rows"),
    "integers, zero points": (q.eight_bit_integers(symmetric=False, scales="groups"), packed(8), "int8, groups of 64"),
    "floats": (q.eight_bit_floats(), ("fp8", {}), "fp8, rows"),
    "floats, rows": (q.eight_bit_floats(rows=True), ("fp8", {}), "fp8, rows"),
    "floats, blocks": (
        q.eight_bit_floats(block=(128, 128), name="weight_scale_inv"),
        ("fp8", {}),
        "fp8, groups of 128",
    ),
    "mxfp4": (q.mxfp4, packed(4), "fp4, groups of 32"),
    "nvfp4": (q.nvfp4(), packed(4), "fp4, groups of 16"),
    "bitsandbytes, 8 bits": (q.bitsandbytes_integers, ("bitsandbytes", {}), "int8, rows"),
    "bitsandbytes, nf4": (q.book_of_four_bits(), ("bitsandbytes", {}), "float32"),
    "orders that differ": (q.gptq(4, order="own"), GPTQ, "float32"),
    "floats, other blocks": (q.eight_bit_floats(block=(64, 64)), ("fp8", {"weight_block_size": [64, 64]}), "float32"),
}


def load(path: Path, name: str) -> tuple[Linear, torch.Tensor]:
    quantize, (method, fields), _ = CASES[name]
    layer = Linear(LinearSpec(256, PARTS), QuantizedMethod(), bias=False, dtype=torch.float32)
    expected = []
    for part in PARTS:
        tensors, dense = quantize(part.name, part.num_rows, 256)
        file = path / f"{part.name}.safetensors"
        save_file({f"layer.{key}": tensor.contiguous() for key, tensor in tensors.items()}, file)
        header = read_quantized(read_stored_weights((file,)), Scheme(method, fields)).matrices["layer.weight"]
        layer.load(part.name, header.read({key: tensors[key] for key in header.tensors}))
        expected.append(torch.from_numpy(dense.astype(np.float32)))
    return layer, torch.cat(expected)


@pytest.mark.parametrize("name", CASES)
def test_codes_stand_for_the_weights_of_the_file(tmp_path: Path, name: str) -> None:
    layer, expected = load(tmp_path, name)
    assert layer.describe().startswith(f"{CASES[name][2]}, stored as ")
    assert torch.equal(layer.dense(), expected)
    assert torch.equal(layer.dense(slice(100, 140)), expected[100:140])


@pytest.mark.parametrize("name", ["GPTQ, activation order", "mxfp4"])
def test_products_are_with_those(tmp_path: Path, name: str) -> None:
    layer, expected = load(tmp_path, name)
    x = torch.randn(3, 256)
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-4, atol=1e-4)
