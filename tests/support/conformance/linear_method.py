"""The laws of a linear method (`engine.quantization.linear.LinearMethod`)."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import weakref

import pytest
import torch
from torch import Tensor, nn

from engine.quantization.linear import Linear, LinearMethod, LinearSpec, Part

SHAPES = ((96, 64), (1, 48), (50, 33), (129, 576))  # outputs, inputs
ROWS = (0, 1, 2, 3, 7, 16, 17, 33)
PARTS = (Part("q_proj", 40), Part("k_proj", 8), Part("v_proj", 9))
NUM_INPUTS = 64


class LinearMethodConformance:
    """tolerance: of an element that is kept, relative to the largest of its row; 0: nothing is lost"""

    tolerance = 0.0
    has_memory = False  # before anything is loaded

    def make(self, *, num_threads: int = 1) -> LinearMethod:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _reproducible(self, one_thread_and_seed: None) -> None:
        """Every test begins with the same seed."""

    def layer(self, method: LinearMethod, parts: tuple[Part, ...] = PARTS, *, num_inputs: int = NUM_INPUTS) -> Linear:
        return Linear(LinearSpec(num_inputs, parts, axis="outputs"), method, bias=False, dtype=torch.float32)

    def loaded(self, weight: Tensor, *, num_threads: int = 1, is_output: bool = False) -> Linear:
        spec = LinearSpec.of(weight, is_output=is_output)
        layer = Linear(spec, self.make(num_threads=num_threads), bias=False, dtype=torch.float32)
        layer.load("", weight)
        return layer

    def weights(self) -> dict[str, Tensor]:
        return {part.name: torch.randn(part.num_rows, NUM_INPUTS) for part in PARTS}

    def assert_close(self, found: Tensor, weight: Tensor) -> None:
        bound = self.tolerance * weight.abs().amax(1, keepdim=True)
        assert found.shape == weight.shape
        assert ((found.float() - weight.float()).abs() <= bound).all()

    def test_a_new_layer_has_its_shape_and_memory_only_if_it_stays(self) -> None:
        layer = self.layer(self.make())
        assert isinstance(layer.weight, nn.Parameter)
        assert (tuple(layer.weight.shape), layer.weight.dtype) == ((57, NUM_INPUTS), torch.float32)
        assert layer.weight.is_meta != self.has_memory

    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_matrix_is_kept_within_the_bound_of_its_format(self, shape: tuple[int, int]) -> None:
        for is_output in (False, True):
            weight = torch.randn(shape) * torch.logspace(-2, 2, shape[0])[:, None]
            self.assert_close(self.loaded(weight, is_output=is_output).dense(), weight)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_a_product_is_with_the_matrix_that_is_kept(self, shape: tuple[int, int]) -> None:
        layer = self.loaded(torch.randn(shape))
        dense = layer.dense().double()
        for num_rows, bias in itertools.product(ROWS, (None, torch.randn(shape[0]))):
            x = torch.randn(num_rows, shape[1])
            layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
            product = layer(x)
            assert product.dtype == x.dtype
            expected = x.double() @ dense.T + (0 if bias is None else bias)
            torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)
            assert layer(x).data_ptr() != product.data_ptr() or not num_rows
            assert torch.equal(layer(x[None])[0], product)

    def test_parts_come_in_any_order_and_lie_in_one(self) -> None:
        weights = self.weights()
        whole = self.layer(self.make())
        whole.load_whole(torch.cat(list(weights.values())))
        self.assert_close(whole.dense(), torch.cat(list(weights.values())))
        for order in itertools.permutations(weights):
            layer = self.layer(self.make())
            for name in order:
                layer.load(name, weights[name])
            assert torch.equal(layer.dense(), whole.dense())
            assert layer.describe() == whole.describe() != ""
            for name, weight in weights.items():
                self.assert_close(layer.dense(layer.spec.rows(name)), weight)

    def test_any_rows_are_those_of_the_whole(self) -> None:
        layer, rng = self.loaded(torch.randn(75, 64)), random.Random(0)
        for _ in range(30):
            start = rng.randrange(75)
            rows = slice(start, rng.choice([None, rng.randrange(start, 76)]))
            assert torch.equal(layer.dense(rows), layer.dense()[rows])

    def test_no_float_stays_when_the_last_part_is_there(self) -> None:
        layer, seen = self.layer(self.make()), []
        for part in PARTS:
            tensor = torch.randn(part.num_rows, NUM_INPUTS)
            seen.append(weakref.ref(tensor))
            layer.load(part.name, tensor)
            del tensor
        gc.collect()
        assert not layer.waiting
        assert not any(reference() is not None for reference in seen)
        assert all(parameter is layer.weight for parameter in layer.parameters())

    def test_16_bits_are_packed_as_the_floats_that_they_are(self) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            weight = torch.randn(48, 64).to(dtype)
            assert torch.equal(self.loaded(weight).dense(), self.loaded(weight.float()).dense())

    def test_elements_beyond_16_bits_are_kept_all_the_same(self) -> None:
        for outlier in (1e5, -3e38):
            weight = torch.randn(48, 64)
            weight[3, 4] = outlier
            layer = self.loaded(weight)
            self.assert_close(layer.dense(), weight)
            x = torch.randn(2, 64) / abs(outlier)
            expected = x.double() @ layer.dense().double().T
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)

    def test_threads_change_nothing(self) -> None:
        weight = torch.randn(1000, 576)
        one, three = (self.loaded(weight, num_threads=num_threads) for num_threads in (1, 3))
        assert torch.equal(one.dense(), three.dense())
        assert one.describe() == three.describe()

    def test_a_copy_has_the_method_in_common(self) -> None:
        layer = self.layer(self.make())
        assert copy.deepcopy(layer).method is layer.method
