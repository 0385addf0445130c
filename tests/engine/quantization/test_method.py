"""Formats of weight matrices against their definitions and their stated bounds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.quantization.linear import Linear, LinearMethod, LinearSpec, Shards, exchange_linears
from engine.quantization.method import FORMATS, HalfMethod, Int8Method, PackedMethod, can_pack, make_methods
from kernels.torch_cpu.int8_linear import dequantize_int8, int8_linear, int8_linear_few_rows, quantize_int8

ROWS = (1, 2, 3, 7, 16, 17, 33)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def make_method(name: str) -> LinearMethod[object]:
    return make_methods(FORMATS, name).method


def prepare_linears(model: nn.Module, name: str) -> int:
    return len(exchange_linears(model, make_methods(FORMATS, name)))


def accepts(method: LinearMethod, weight: Tensor) -> bool:
    return method.accepts(LinearSpec.of(weight), weight.dtype, weight.device)


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_with_the_matrix_that_the_format_defines(name: str) -> None:
    method = make_method(name)
    for out_features, in_features in ((96, 64), (1, 48), (50, 33), (129, 576)):
        weight = method.pack(Shards.of(torch.randn(out_features, in_features)))
        dense = method.dense(weight).double()
        assert dense.shape == (out_features, in_features)
        for num_rows in ROWS:
            x = torch.randn(num_rows, in_features)
            product = method.apply(x, weight, None)
            assert product.dtype == x.dtype
            torch.testing.assert_close(product.double(), x.double() @ dense.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype)])
def test_packing_keeps_every_bit_of_the_matrix(dtype: torch.dtype) -> None:
    weight = torch.randn(80, 48, dtype=dtype)
    packed = PackedMethod()
    assert torch.equal(packed.dense(packed.pack(Shards.of(weight))), weight)


def test_only_large_float32_matrices_are_packed() -> None:
    packed = PackedMethod(min_float32_elements=1000)
    assert not accepts(packed, torch.zeros(9, 111))
    assert accepts(packed, torch.zeros(10, 100))


def test_half_weights_are_rounded_to_float16_and_no_further() -> None:
    weight = torch.randn(64, 64) * torch.logspace(-9, 3, 64)
    half = HalfMethod()
    assert torch.equal(half.dense(half.pack(Shards.of(weight))), weight.half().float())
    assert ((weight.half().float() - weight).abs() <= (weight.abs() * 2**-11).clamp(min=2**-25)).all()


@pytest.mark.parametrize("outlier", [7e4, float("inf"), float("nan")])
def test_a_matrix_beyond_float16_stays_as_it_is(outlier: float) -> None:
    weight = torch.randn(8, 8)
    assert HalfMethod().pack(Shards.of(weight)) is not None
    weight[3, 4] = outlier
    assert HalfMethod().pack(Shards.of(weight)) is None
    holder = nn.ModuleList([nn.Linear(8, 8).requires_grad_(False)])
    holder[0].weight.copy_(weight)
    assert prepare_linears(holder, "fp16") == 0
    assert torch.equal(holder[0].weight.nan_to_num(), weight.nan_to_num())


def test_int8_is_within_half_a_step_of_every_element() -> None:
    for scale in (1e-4, 1.0, 300.0):
        weight = scale * torch.randn(70, 90) * torch.logspace(-3, 3, 70)[:, None]
        weight[5] = 0.0
        values, scales = quantize_int8(weight)
        step = weight.abs().amax(dim=1, keepdim=True) / 127 * (1 + 2**-8)
        assert ((dequantize_int8(values, scales) - weight).abs() <= step / 2 * (1 + 1e-5)).all()
        assert values.abs().max() <= 127
        assert torch.equal(scales, scales.bfloat16().float())


def test_an_int8_product_is_within_its_stated_bound() -> None:
    weight, x = torch.randn(60, 100), torch.randn(9, 100)
    method = Int8Method()
    product = method.apply(x, method.pack(Shards.of(weight)), None).double()
    half_step = weight.abs().amax(dim=1) / 254 * (1 + 2**-8)
    bound = x.abs().sum(dim=1, keepdim=True).double() * half_step.double()
    error = (product - x.double() @ weight.double().T).abs()
    assert (error <= bound + 1e-4).all()
    assert error.max() > 0


def test_an_int8_product_does_not_depend_on_the_size_of_its_pieces() -> None:
    values, scales = quantize_int8(torch.randn(50, 32))
    x = torch.randn(6, 32)
    expected = x @ dequantize_int8(values, scales).T
    for size in (32, 33, 32 * 7, 32 * 50, 32 * 64):
        scratch = torch.full((size,), torch.nan)
        torch.testing.assert_close(int8_linear(x, values, scales, scratch), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("outlier", [float("inf"), float("-inf"), float("nan")])
def test_a_matrix_that_is_not_finite_is_not_rounded_to_int8(outlier: float) -> None:
    """Rounded, a weight that is no number would become 0, and a damaged model would seem whole."""
    weight = torch.randn(8, 8)
    assert Int8Method().pack(Shards.of(weight)) is not None
    weight[3, 4] = outlier
    assert Int8Method().pack(Shards.of(weight)) is None
    layer = Linear(LinearSpec.of(weight), Int8Method(), bias=False, dtype=torch.float32)
    layer.load("", weight)
    assert layer.describe() == "float32"
    assert torch.equal(layer.dense().nan_to_num(), weight.nan_to_num())


def test_int8_under_float16_has_the_range_that_float16_weights_have() -> None:
    """Neither scales of small rows nor sums before they are scaled may leave it."""
    method = Int8Method()
    weight = (torch.randn(20, 576) * torch.logspace(-6, -1, 20)[:, None]).half()
    x = torch.randn(9, 576).half()
    x[:, 7] = 3000.0
    packed = method.pack(Shards.of(weight))
    half_step = weight.double().abs().amax(dim=1) / 254 * (1 + 2**-8)
    assert ((method.dense(packed).double() - weight.double()).abs() <= half_step[:, None] * (1 + 1e-5)).all()
    product = method.apply(x, packed, None)
    assert product.dtype == torch.float16
    expected = x.double() @ weight.double().T
    rounding = half_step + weight.double().abs().amax(dim=1) * 2**-11 + 2**-25  # of an element, the second in float16
    bound = x.double().abs().sum(dim=1, keepdim=True) * rounding + expected.abs() * 2**-10 + 2**-24
    assert ((product.double() - expected).abs() <= bound).all()


def test_both_int8_kernels_agree_in_bfloat16() -> None:
    values, scales = quantize_int8(torch.randn(64, 128))
    for num_rows in (1, 5, 16):
        x = torch.randn(num_rows, 128, dtype=torch.bfloat16)
        few = int8_linear_few_rows(x, values, scales.bfloat16())
        many = int8_linear(x, values, scales.bfloat16(), torch.empty(64 * 128, dtype=torch.bfloat16))
        torch.testing.assert_close(few, many, rtol=2e-2, atol=0.2)


class TiedModel(nn.Module):
    """An embedding that shares its matrix with the output, layers with and without bias, and weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 48), nn.Linear(48, 32, bias=False)])
        self.experts = nn.Parameter(torch.randn(32, 32))
        self.lm_head = nn.Linear(32, 96, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embedding(token_ids)
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.lm_head(x @ self.experts)


@pytest.mark.parametrize(("name", "tolerance"), [("fp16", 2e-3), ("int8", 2e-2)])
def test_a_prepared_model_computes_the_same_within_its_format(name: str, tolerance: float) -> None:
    model = TiedModel().requires_grad_(False)
    prepared = copy.deepcopy(model)
    assert prepare_linears(prepared, name) == 3
    assert not any(type(module) is nn.Linear for module in prepared.modules())
    token_ids = torch.randint(96, (2, 5))  # as transformers' layers have it: a batch dimension in front
    expected = model(token_ids)
    error = (prepared(token_ids) - expected).abs().max()
    assert 0 < error <= tolerance * expected.abs().max()
    assert torch.equal(prepared.embedding.weight, model.embedding.weight)


def test_an_unquantised_model_computes_the_same() -> None:
    model = TiedModel().requires_grad_(False)
    prepared = copy.deepcopy(model)
    prepare_linears(prepared, "none")
    token_ids = torch.randint(96, (5,))
    torch.testing.assert_close(prepared(token_ids), model(token_ids))


def test_a_packed_layer_equals_the_plain_one() -> None:
    plain = nn.Linear(2048, 2048).requires_grad_(False)
    holder = nn.ModuleList([copy.deepcopy(plain)])
    assert prepare_linears(holder, "none") == 1
    for num_rows in ROWS:
        x = torch.randn(num_rows, 2048)
        torch.testing.assert_close(holder[0](x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_the_float_matrix_is_gone_after_packing(name: str) -> None:
    holder = nn.ModuleList([nn.Linear(64, 32).requires_grad_(False)])
    prepare_linears(holder, name)
    assert isinstance(holder[0], Linear)
    assert [parameter.shape for parameter in holder.parameters()] == [(32,)]  # the bias alone


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows_give_no_rows(name: str) -> None:
    holder = nn.ModuleList([nn.Linear(64, 32).requires_grad_(False)])
    prepare_linears(holder, name)
    assert holder[0](torch.empty(0, 64)).shape == (0, 32)


@pytest.mark.parametrize("name", ["none", "fp16", "int8"])
def test_bfloat16_models_stay_bfloat16(name: str) -> None:
    plain = nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    holder = nn.ModuleList([copy.deepcopy(plain)])
    prepare_linears(holder, name)
    for num_rows in (1, 40):
        x = torch.randn(num_rows, 64, dtype=torch.bfloat16)
        torch.testing.assert_close(holder[0](x), plain(x), rtol=3e-2, atol=3e-2)


def test_an_unknown_format_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(ValueError, match=r"'int3', but the formats are none, fp16, int8"):
        prepare_linears(nn.Linear(4, 4), "int3")
