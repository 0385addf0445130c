"""Which format each matrix of a model is kept in, and that nothing of it is lost where that is promised."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from engine.config import Activations
from engine.quantization.linear import Linear, LinearSpec, Part, Shards, exchange_linears
from engine.quantization.method import COMPILED_FORMATS, make_methods, most_stored
from engine.quantization.numba_cpu import CompiledMethod
from engine.quantization.stored_levels import StoredLevels
from kernels.numba.core.formats import INT4, INT8, INTEGERS, NAMES, Q4_K, Q6_K, QUADS, SIZES, Levels
from kernels.numba.packing.packing import Stack
from tests.support.quantised import random_levels, weights_of

PLANNED_BYTES = {name: format.num_bytes for name, format in COMPILED_FORMATS.items() if format.num_bytes is not None}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class Stored(StoredLevels):
    """As a file would have it."""

    rows: Levels

    @classmethod
    def random(cls, kind: int, num_rows: int = 48, depth: int = 256) -> Stored:
        return cls((num_rows, depth), kind, random_levels(kind, num_rows, depth))

    def levels(self, start: int, stop: int) -> Levels:
        rows = self.rows
        commons = None if rows.commons is None else rows.commons[start:stop]
        return Levels(rows.kind, rows.levels[start:stop], rows.factors[start:stop], commons)

    def dense(self, start: int, stop: int) -> Tensor:
        return weights_of(self.rows)[start:stop]


def make_method(name: str, *, num_threads: int = 1, activations: Activations = "int16") -> CompiledMethod:
    method = make_methods(COMPILED_FORMATS, name, num_threads=num_threads, activations=activations).method
    assert isinstance(method, CompiledMethod)
    return method


def pack_linear(
    weight: Tensor | StoredLevels,
    name: str,
    *,
    is_output: bool = False,
    num_threads: int = 1,
    activations: Activations = "int16",
) -> Stack:
    spec = LinearSpec(weight.shape[1], (Part("", len(weight)),), is_output=is_output)
    dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32
    method = make_method(name, num_threads=num_threads, activations=activations)
    return method.pack(Shards(spec, dtype, [weight]))


def dense(packed: Stack) -> Tensor:
    return packed.dense(0, packed.num_rows)


MATRICES = {
    "float32": lambda: torch.randn(48, 64),
    "bfloat16": lambda: torch.randn(48, 64).bfloat16(),
    "float16": lambda: torch.randn(48, 64).half(),
    "no groups": lambda: torch.randn(48, 40),
    "beyond float16": lambda: torch.randn(48, 64) * 1e5,
    "infinite": lambda: torch.randn(48, 64).index_fill(1, torch.tensor([3]), torch.inf),
}
KEPT_IN = {  # what each of them is kept in for formats none, fp16, int8, int4
    "float32": ("float32", "float16", "int8", "int4"),
    "bfloat16": ("bfloat16", "bfloat16", "int8", "int4"),
    "float16": ("float16", "float16", "int8", "int4"),
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
        is_exact = torch.equal(dense(packed), weight.float())
        if asked == "none" or kept == "float32":
            assert is_exact
        elif kept != "int4" and name in ("bfloat16", "float16"):
            assert is_exact == (kept == name)


@pytest.mark.parametrize("kind", [kind for kind in INTEGERS if kind < QUADS], ids=NAMES.get)
@pytest.mark.parametrize("activations", ["int16", "int8"])
def test_integers_of_a_file_stay_what_they_are(kind: int, activations: Activations) -> None:
    stored = Stored.random(kind)
    for asked, format in COMPILED_FORMATS.items():
        packed = pack_linear(stored, asked, num_threads=3, activations=activations)
        if format.num_bytes is None:
            assert packed.format_name.startswith("float"), "none knows floats only"
        elif SIZES[kind] <= most_stored(format.num_bytes):
            assert packed.format_name.startswith(INTEGERS[kind].name)
            assert packed.num_bytes == 48 * 256 * SIZES[kind]
        else:
            assert packed.format_name.startswith("int4")
            continue
        assert torch.equal(dense(packed), stored.dense(0, 48))
        assert torch.equal(packed.dense(17, 40), stored.dense(17, 40))


def test_parts_of_a_matrix_may_differ() -> None:
    """As queries, keys and values of llama.cpp's mixtures do, and a part that was left in 16 bits."""
    parts: dict[str, Tensor | StoredLevels] = {
        "q": Stored.random(Q4_K, 64), "k": Stored.random(Q4_K, 32), "v": Stored.random(Q6_K, 32),
        "w": torch.randn(24, 256).bfloat16(),
    }  # fmt: skip
    spec = LinearSpec(256, tuple(Part(name, len(part)) for name, part in parts.items()))
    floats = [part if isinstance(part, Tensor) else part.dense(0, len(part)) for part in parts.values()]
    for name, kept in (("fp16", "Q4_K + Q6_K + bfloat16"), ("int4", "Q4_K + int4"), ("none", "float32")):
        method = make_method(name)
        packed = method.pack(Shards(spec, torch.float32, list(parts.values())))
        assert packed.format_name == kept
        if name != "int4":
            assert torch.equal(method.dense(packed), torch.cat([part.float() for part in floats]))
        assert torch.equal(method.dense(packed, spec.rows("k")), floats[1])


def test_parts_that_fill_no_panel_are_one_matrix() -> None:
    parts = [Stored.random(Q4_K, 20), Stored.random(Q6_K, 28)]
    spec = LinearSpec(256, (Part("a", 20), Part("b", 28)))
    packed = make_method("int8").pack(Shards(spec, torch.float32, list(parts)))
    assert packed.format_name == "int8"
    same = [Stored.random(Q4_K, 20), Stored.random(Q4_K, 28)]
    packed = make_method("int8", num_threads=2).pack(Shards(spec, torch.float32, list(same)))
    assert packed.format_name == "Q4_K"
    assert torch.equal(dense(packed), torch.cat([part.dense(0, len(part)) for part in same]))


@pytest.mark.parametrize("activations", ["int16", "int8"])
def test_a_table_stays_in_integers_and_shares_those_of_the_output_layer(activations: Activations) -> None:
    for kind in (Q4_K, Q6_K, INT8, INT4):
        stored, ids = Stored.random(kind, 70), torch.randint(0, 70, (9,))
        for name in COMPILED_FORMATS:
            method = make_method(name, activations=activations)
            spec = LinearSpec(256, (Part("", 70),), is_output=True)
            output = method.pack(Shards(spec, torch.float32, [stored]))
            table = method.keep_table(stored, output)
            assert (table.packed is output.parts[0]) == (name != "none")
            assert torch.equal(table.rows(ids), stored.dense(0, 70)[ids])
            assert torch.equal(method.keep_table(stored, None).rows(ids), table.rows(ids))


@pytest.mark.parametrize("name", MATRICES)
def test_activations_of_8_bits_change_the_layout_of_integers_and_nothing_else(name: str) -> None:
    weight = MATRICES[name]()
    for asked in COMPILED_FORMATS:
        packed = pack_linear(weight, asked)
        other = pack_linear(weight, asked, activations="int8", num_threads=3)
        assert torch.equal(dense(other), dense(packed))
        assert other.num_bytes == packed.num_bytes
        assert other.format_name.startswith(packed.format_name)
        assert (other.format_name != packed.format_name) == packed.format_name.startswith("int")


def test_logits_keep_eight_bits() -> None:
    weight = torch.randn(48, 64)
    assert pack_linear(weight, "int4", is_output=True).format_name == "int8"
    exact = Stored.random(Q6_K)
    packed = pack_linear(exact, "int4", is_output=True)  # these lose nothing
    assert packed.format_name == "Q6_K"
    assert torch.equal(dense(packed), exact.dense(0, 48))


@pytest.mark.parametrize("name", PLANNED_BYTES)
def test_a_weight_takes_no_more_than_was_planned(name: str) -> None:
    packed = pack_linear(MATRICES["float32"](), name)
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
        assert torch.equal(module.dense(), dense(expected))
        assert (module.bias is None) == (linear.bias is None)
    assert torch.equal(matrices["layers.0"].bias, model.layers[0].bias)
