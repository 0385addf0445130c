"""Which format each matrix of a model is kept in, and that nothing of it is lost where that is promised."""

from __future__ import annotations

import copy

import gguf
import pytest
import torch
from torch import Tensor, nn

from engine.config import Activations
from engine.quantization.linear import Linear, Shards, exchange_linears
from engine.quantization.method import COMPILED_FORMATS, make_methods
from kernels.numba.packing.packing import PackedMatrix, unpack

PLANNED_BYTES = {name: format.num_bytes for name, format in COMPILED_FORMATS.items() if format.num_bytes is not None}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pack_linear(
    weight: Tensor, name: str, *, is_output: bool = False, num_threads: int = 1, activations: Activations = "int16"
) -> PackedMatrix:
    method = make_methods(COMPILED_FORMATS, name, num_threads=num_threads, activations=activations).method
    packed = method.pack(Shards.of(weight, is_output=is_output))
    assert isinstance(packed, PackedMatrix)
    return packed


def as_in_a_file(weight: Tensor, block: str) -> Tensor:
    """The matrix that a GGUF file with such blocks gives back."""
    kind = gguf.GGMLQuantizationType[block]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind).copy())


MATRICES = {
    "float32": lambda: torch.randn(48, 64),
    "bfloat16": lambda: torch.randn(48, 64).bfloat16(),
    "float16": lambda: torch.randn(48, 64).half(),
    "Q8_0": lambda: as_in_a_file(torch.randn(48, 64), "Q8_0"),
    "Q4_0": lambda: as_in_a_file(torch.randn(48, 64), "Q4_0"),
    "Q4_1": lambda: as_in_a_file(torch.randn(48, 64), "Q4_1"),
    "no groups": lambda: torch.randn(48, 40),
    "beyond float16": lambda: torch.randn(48, 64) * 1e5,
    "infinite": lambda: torch.randn(48, 64).index_fill(1, torch.tensor([3]), torch.inf),
}
KEPT_IN = {  # what each of them is kept in for formats none, fp16, int8, int4
    "float32": ("float32", "float16", "int8", "int4"),
    "bfloat16": ("bfloat16", "bfloat16", "int8", "int4"),
    "float16": ("float16", "float16", "int8", "int4"),
    "Q8_0": ("float32", "int8", "int8", "int4"),
    "Q4_0": ("float32", "int4", "int4", "int4"),
    "Q4_1": ("float32", "int4", "int4", "int4"),
    "no groups": ("float32", "float16", "float16", "float16"),
    "beyond float16": ("float32", "float32", "float32", "float32"),
    "infinite": ("float32", "float32", "float32", "float32"),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_is_kept_in_the_smallest_format_that_the_setting_allows(name: str) -> None:
    weight = MATRICES[name]()
    for asked, kept in zip(COMPILED_FORMATS, KEPT_IN[name], strict=True):
        packed = pack_linear(weight, asked)
        assert packed.format_name == kept, asked
        is_exact = torch.equal(unpack(packed), weight.float())
        if asked == "none" or kept == "float32":
            assert is_exact
        elif kept != "int4" and name in ("bfloat16", "float16", "Q8_0"):
            assert is_exact == (kept == name.lower().replace("q8_0", "int8"))


@pytest.mark.parametrize("name", MATRICES)
def test_activations_of_8_bits_change_the_layout_of_integers_and_nothing_else(name: str) -> None:
    weight = MATRICES[name]()
    for asked in COMPILED_FORMATS:
        packed = pack_linear(weight, asked)
        other = pack_linear(weight, asked, activations="int8", num_threads=3)
        assert torch.equal(unpack(other), unpack(packed))
        assert other.num_bytes == packed.num_bytes
        assert other.format_name.startswith(packed.format_name)
        assert (other.format_name != packed.format_name) == packed.format_name.startswith("int")


def test_logits_keep_eight_bits() -> None:
    weight = torch.randn(48, 64)
    assert pack_linear(weight, "int4", is_output=True).format_name == "int8"
    exact = as_in_a_file(weight, "Q4_0")
    packed = pack_linear(exact, "int4", is_output=True)  # these lose nothing
    assert packed.format_name == "int4"
    assert torch.equal(unpack(packed), exact)


@pytest.mark.parametrize("name", PLANNED_BYTES)
def test_a_weight_takes_no_more_than_was_planned(name: str) -> None:
    for make in (MATRICES["float32"], MATRICES["Q8_0"]):
        packed = pack_linear(make(), name)
        assert packed.num_bytes <= 48 * 64 * PLANNED_BYTES[name]


class Tied(nn.Module):
    """An embedding that shares its matrix with the output, and layers with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 48), nn.Linear(48, 32, bias=False)])
        self.norm = nn.Parameter(torch.randn(32))
        self.lm_head = nn.Linear(32, 96, bias=False)
        self.lm_head.weight = self.embedding.weight


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("name", COMPILED_FORMATS)
def test_the_linear_layers_of_a_model_are_exchanged_and_nothing_else(name: str, num_threads: int) -> None:
    model = Tied().requires_grad_(False)
    packed = copy.deepcopy(model)
    layers = exchange_linears(packed, make_methods(COMPILED_FORMATS, name, num_threads=num_threads))
    matrices = {path: module for path, module in packed.named_modules() if isinstance(module, Linear)}
    assert list(matrices) == ["layers.0", "layers.1", "lm_head"]
    assert set(layers) == set(matrices.values())
    assert set(packed.state_dict()) == {"embedding.weight", "norm", "layers.0.bias"}
    assert torch.equal(packed.embedding.weight, model.embedding.weight)
    for path, module in matrices.items():
        linear = model.get_submodule(path)
        expected = pack_linear(linear.weight, name, is_output=path == "lm_head")
        assert torch.equal(unpack(module.weight), unpack(expected))
        assert (module.bias is None) == (linear.bias is None)
    assert torch.equal(matrices["layers.0"].bias, model.layers[0].bias)
