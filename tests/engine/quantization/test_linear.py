"""Every way to keep a matrix obeys the laws of a linear method; and what layers know before they have one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.quantization.linear import Linear, LinearMethod, LinearMethods, LinearSpec, Part, PlainMethod
from engine.quantization.method import FORMATS, HalfMethod, Int8Method, PackedMethod, make_methods
from engine.quantization.numba_cpu import ExactMethod, Int4Method
from engine.quantization.numba_cpu import HalfMethod as CompiledHalfMethod
from engine.quantization.numba_cpu import Int8Method as CompiledInt8Method
from tests.support.conformance.linear_method import LinearMethodConformance


class TestPlain(LinearMethodConformance):
    has_memory = True

    def make(self, *, num_threads: int = 1) -> LinearMethod:
        return PlainMethod()


class TestPacked(LinearMethodConformance):
    def make(self, *, num_threads: int = 1) -> LinearMethod:
        return PackedMethod(num_threads, min_float32_elements=0)


class TestHalf(LinearMethodConformance):
    tolerance = 2**-11

    def make(self, *, num_threads: int = 1) -> LinearMethod:
        return HalfMethod(num_threads)


class TestInt8(LinearMethodConformance):
    tolerance = (1 + 2**-7) / 254

    def make(self, *, num_threads: int = 1) -> LinearMethod:
        return Int8Method(num_threads)


class TestCompiledExact(LinearMethodConformance):
    def make(self, *, num_threads: int = 1) -> LinearMethod:
        return ExactMethod(num_threads)


class TestCompiledHalf(LinearMethodConformance):
    tolerance = 2**-11

    def make(self, *, num_threads: int = 1) -> LinearMethod:
        return CompiledHalfMethod(num_threads)


class TestCompiledInt8(LinearMethodConformance):
    tolerance = 1 / 254 + 2**-10

    def make(self, *, num_threads: int = 1) -> LinearMethod:
        return CompiledInt8Method(num_threads)


class TestCompiledInt4(LinearMethodConformance):
    tolerance = 1 / 15 + 2**-9

    def make(self, *, num_threads: int = 1) -> LinearMethod:
        return Int4Method(num_threads)


def test_a_layer_knows_how_devices_would_cut_it_and_where_adapters_add() -> None:
    spec = LinearSpec(8, (Part("q_proj", 6), Part("k_proj", 2), Part("v_proj", 2)), axis="outputs")
    assert spec.shape == (10, 8)
    assert [spec.rows(name) for name in ("q_proj", "k_proj", "v_proj")] == [slice(0, 6), slice(6, 8), slice(8, 10)]
    with pytest.raises(KeyError):
        spec.rows("o_proj")


def test_a_method_keeps_what_gains_by_it_and_the_rest_is_plain() -> None:
    methods = LinearMethods(PackedMethod(min_float32_elements=1000))
    small, large = (LinearSpec(10, (Part("", size),)) for size in (99, 100))
    assert isinstance(methods.of(small, torch.float32), PlainMethod)
    assert methods.of(large, torch.float32) is methods.method
    assert isinstance(methods.of(LinearSpec(0, (Part("", 5),)), torch.float32), PlainMethod)
    assert isinstance(LinearMethods().of(large, torch.float32), PlainMethod)


def test_what_no_format_holds_stays_where_it_is_if_the_layer_has_it() -> None:
    """As an output layer has the embedding's matrix."""
    table = nn.Parameter(torch.full((5, 8), 1e6), requires_grad=False)
    layer = Linear(LinearSpec(8, (Part("", 5),)), make_methods(FORMATS, "fp16").method, bias=False, dtype=table.dtype)
    layer.weight = table
    layer.load_whole(table.data)
    assert layer.weight is table
    assert isinstance(layer.method, PlainMethod)
