"""Weight formats of a GPU, by Triton's kernels: the laws of a method, floats that are rounded, codes that are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.quantization.linear import Linear, LinearMethod, LinearSpec, Part
from engine.quantization.method import TRITON_FORMATS, make_methods
from engine.quantization.stored_codes import StoredCodes, matrix_of_codes
from engine.quantization.triton_gpu import (
    Fp8Method,
    Int4Method,
    Int8Method,
    QuantizedMethod,
    matrix_of_scaled,
)
from kernels.reference.quantized import dequantize, quantize_rows, scaled_linear
from kernels.triton import configs
from kernels.triton.configs import strict_quantized_config
from kernels.triton.quantized import linear
from kernels.triton.quantized.linear import quantized_linear as product
from kernels.triton.quantized.matrix import QuantizedMatrix
from kernels.triton.quantized.scaled_matrix import ScaledMatrix
from tests.support.conformance.linear_method import LinearMethodConformance
from tests.support.simulated_gpu import simulated_gpu

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter was not chosen before its import"),
    pytest.mark.usefixtures("one_thread_and_seed"),
]
PARTS = (Part("q_proj", 24), Part("k_proj", 8))


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for any tile."""
    entry = configs._table("default")["quantized"]["float32"]
    monkeypatch.setitem(entry, "rows", 64)
    monkeypatch.setitem(entry, "columns", 128)


class TestInt8(LinearMethodConformance):
    tolerance = (1 + 2**-7) / 254

    def make(self, *, num_threads: int = 1) -> LinearMethod:
        return Int8Method(num_threads)


class TestInt4(LinearMethodConformance):
    tolerance = 2 / 15 + 2**-7

    def make(self, *, num_threads: int = 1) -> LinearMethod:
        return Int4Method(num_threads)


def layer_of(
    method: LinearMethod, parts: tuple[Part, ...] = PARTS, *, num_inputs: int = 128, is_output: bool = False
) -> Linear:
    return Linear(LinearSpec(num_inputs, parts, is_output=is_output), method, bias=False, dtype=torch.float32)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_matrix_takes_the_bytes_that_are_planned(name: str) -> None:
    format = TRITON_FORMATS[name]
    for is_output in (False, True):
        method = make_methods(TRITON_FORMATS, name).method
        layer = layer_of(method, (Part("", 40),), num_inputs=256, is_output=is_output)
        layer.load("", torch.randn(40, 256))
        assert isinstance(layer.weight, QuantizedMatrix)
        planned = format.output if is_output else format.num_bytes
        assert planned is not None
        assert 0.9 * planned <= layer.weight.nbytes / (40 * 256) <= planned
        assert layer.describe() == ("int8, groups of 128" if name == "int8" or is_output else "int4, groups of 32")


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_floats(wrong: float) -> None:
    weight = torch.randn(40, 128)
    weight[3, 4] = wrong
    layer = layer_of(Int4Method(), (Part("", 40),))
    layer.load("", weight)
    assert layer.is_plain
    assert torch.equal(layer.dense().nan_to_num(), weight.nan_to_num())


def stored(num_outputs: int, **others: Any) -> StoredCodes:
    codes = torch.randint(16, (num_outputs, 128), dtype=torch.uint8)
    return StoredCodes(codes, torch.rand(num_outputs, 4).half(), torch.randint(17, (num_outputs, 4)), **others)


def dense(part: StoredCodes) -> Tensor:
    return dequantize(part.codes, part.scales, part.zeros)


def test_the_codes_of_a_checkpoint_are_multiplied_with_as_they_are() -> None:
    """As GPTQ's have it: a zero of their own, and inputs in the order in which they were quantised."""
    order = torch.randperm(128)
    parts = [stored(part.num_rows, order=order) for part in PARTS]
    layer = layer_of(QuantizedMethod())
    layer.keep(matrix_of_codes(layer.spec, parts, bits=4, group_size=32))
    expected = torch.empty(32, 128)
    expected[:, order] = torch.cat([dense(part) for part in parts])
    assert torch.equal(layer.dense(), expected)
    assert torch.equal(layer.dense(layer.spec.rows("k_proj")), expected[24:])
    x = torch.randn(3, 128)
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-4, atol=1e-4)


def test_parts_that_do_not_fit_together_are_refused() -> None:
    spec = LinearSpec(128, PARTS)
    orders = torch.randperm(128), torch.randperm(128)
    cases: list[tuple[list[StoredCodes], str]] = [
        ([stored(24)], r"codes of \(24, 128\) for a matrix of \(32, 128\)"),
        ([stored(24, order=orders[0]), stored(8, order=orders[1])], "in different orders"),
        ([stored(24, order=orders[0]), stored(8)], "some parts of a matrix have their inputs in another order"),
        ([stored(24), StoredCodes(*(stored(8).codes, stored(8).scales))], "some parts of a matrix have zeros"),
    ]
    for parts, text in cases:
        with pytest.raises(ValueError, match=text):
            matrix_of_codes(spec, parts, bits=4, group_size=32)
    with pytest.raises(ValueError, match="groups of 48 inputs"):
        matrix_of_codes(spec, [stored(24), stored(8)], bits=4, group_size=48)


def test_rows_are_independent_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of rows has one config. Its bits are a GPU's to show: in the interpreter the host's BLAS adds up."""
    method = Int4Method()
    layer = layer_of(method, (Part("", 40),))
    layer.load("", torch.randn(40, 128))
    alone = method.with_independent_rows()
    assert type(alone) is Int4Method
    asked = []
    monkeypatch.setattr(
        linear, "quantized_linear", lambda *args, config: asked.append(config) or product(*args, config=config)
    )
    x = torch.randn(70, 128)
    whole = alone.apply(x, layer.weight, None)
    for rows in (slice(0, 1), slice(3, 20), slice(60, 70)):
        torch.testing.assert_close(alone.apply(x[rows], layer.weight, None), whole[rows])
    assert asked == [strict_quantized_config(torch.float32, chip="default")] * 4


def test_fp8_meets_fp8() -> None:
    weight, x = torch.randn(40, 128) * torch.logspace(-2, 2, 40)[:, None], torch.randn(3, 128)
    layer = layer_of(Fp8Method(), (Part("", 40),))
    layer.load("", weight)
    assert isinstance(layer.weight, ScaledMatrix)
    assert layer.describe() == "fp8 by fp8, rows"
    error = (layer.dense() - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, weight.abs().amax(1, keepdim=True) / 448 / 1024) * 1.001).all()
    expected = scaled_linear(*quantize_rows(x, torch.float8_e4m3fn), layer.weight.values, layer.weight.scales)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-2, atol=float(expected.abs().max()) * 1e-2)
    alone = layer.method.with_independent_rows()
    whole = alone.apply(x, layer.weight, None)
    assert torch.equal(alone.apply(x[1:2], layer.weight, None), whole[1:2])


@pytest.mark.parametrize(("capability", "name"), [((8, 0), "fp8, rows"), ((8, 9), "fp8 by fp8, rows")])
def test_a_chip_without_fp8_takes_activations_as_they_are(capability: tuple[int, int], name: str) -> None:
    with simulated_gpu(capability=capability), torch.device("cuda"):
        layer = layer_of(Fp8Method(), (Part("", 40),))
        layer.load("", torch.randn(40, 128, device="cpu"))
        assert layer.describe() == name


def test_logits_of_fp8_are_those_of_int8() -> None:
    layer = layer_of(Fp8Method(), (Part("", 40),), num_inputs=256, is_output=True)
    layer.load("", torch.randn(40, 256))
    assert layer.describe() == "int8, groups of 128"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scaled_values_of_a_checkpoint_are_kept_as_they_are(dtype: torch.dtype) -> None:
    parts = [quantize_rows(torch.randn(part.num_rows, 128), dtype) for part in PARTS]
    layer = layer_of(QuantizedMethod())
    layer.keep(matrix_of_scaled(layer.spec, [(parts[0][0], parts[0][1]), (parts[1][0], parts[1][1][:1])]))
    expected = [parts[0][0].float() * parts[0][1][:, None], parts[1][0].float() * parts[1][1][:1]]
    assert torch.equal(layer.dense(), torch.cat(expected))
    layer.keep(matrix_of_scaled(layer.spec, parts, quantizes_rows=False))
    x = torch.randn(3, 128)
    torch.testing.assert_close(layer(x), x @ layer.dense().T, rtol=1e-4, atol=1e-4)


def test_blocks_of_scales_must_not_cross_parts() -> None:
    blocks, values = torch.ones(2, 1), torch.ones(130, 128, dtype=torch.int8)
    parts = [(torch.ones(256, 128, dtype=torch.int8), blocks), (values, blocks)]
    spec = LinearSpec(128, (Part("q_proj", 256), Part("k_proj", 130)))
    assert QuantizedMethod().describe(matrix_of_scaled(spec, parts)) == "int8 by int8, blocks"
    spec = LinearSpec(128, (Part("q_proj", 130), Part("k_proj", 130)))
    with pytest.raises(ValueError, match="not made of whole blocks of 128 outputs"):
        matrix_of_scaled(spec, [(values, blocks), (values, blocks)])
