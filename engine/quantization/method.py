"""Ways to keep a weight matrix on the CPU, and the exchange of a model's nn.Linear modules for them.

What a format costs and gains is measured by `python -m loadtest.micro.linear`; the choices below cite it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from engine.lazy_import import load_object
from kernels.torch_cpu.int8_linear import (
    SCRATCH_ELEMENTS,
    dequantize_int8,
    int8_linear,
    int8_linear_few_rows,
    quantize_int8,
)

W = TypeVar("W")

FORMATS = {
    "none": "engine.quantization.method:PackedFormat",
    "fp16": "engine.quantization.method:HalfFormat",
    "int8": "engine.quantization.method:Int8Format",
}
COMPILED_FORMATS = {  # of `engine.quantization.numba_cpu`, which is imported only where it runs
    "none": "bfloat16, float16 or float32, whichever holds every weight of a matrix as it is",
    "fp16": "float16, or what is smaller and holds every weight: bfloat16, or the int8 or int4 of a GGUF file",
    "int8": "8 bits and a scale for each 32 weights",
    "int4": "4 bits, a scale and an offset for each 32 weights; the output layer has 8 bits",
}


class QuantFormat(Protocol[W]):
    """A way to store a weight matrix: W is what is stored."""

    kept_as: ClassVar[str]  # for people; empty: in the model's own dtype
    packs_with_one_thread: ClassVar[bool]  # `quantize` is not parallel in itself: several matrices are packed at once

    def accepts(self, weight: Tensor) -> bool:
        """Whether this matrix gains by it. A matrix that is not accepted stays as it is."""
        ...

    def quantize(self, weight: Tensor) -> W:
        """At load time, from [out_features, in_features] floats."""
        ...

    def dequantize(self, weight: W) -> Tensor:
        """The matrix that `matmul` multiplies by: the definition, with which tests compare."""
        ...

    def matmul(self, x: Tensor, weight: W) -> Tensor:
        """x @ dequantize(weight).T; x: [num_rows, in_features]. Returns x's dtype, in new memory."""
        ...


class QuantLinear(nn.Module, Generic[W]):
    """A linear layer whose matrix is kept in some format; the bias stays as it was."""

    def __init__(self, quant_format: QuantFormat[W], weight: W, bias: Tensor | None, shape: torch.Size) -> None:
        super().__init__()
        self.format, self.packed, self.bias = quant_format, weight, bias
        self.out_features, self.in_features = shape

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]"""
        out = self.format.matmul(x.reshape(-1, self.in_features), self.packed)
        if self.bias is not None:
            out.add_(self.bias)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], self.out_features)


def prepare_linears(model: nn.Module, format_name: str, *, num_threads: int = 1) -> int:
    """Exchanges the nn.Linear modules of `model` for packed ones, in place; returns how many.

    Each frees its float matrix, so that memory peaks at a few matrices more than before. An embedding that shares its
    matrix with the output layer keeps it. Weights that are no nn.Linear (experts, for one) are left alone.
    `num_threads`: what products will run with. ValueError for a format that does not exist or cannot run here.
    """
    if format_name not in FORMATS:
        raise ValueError(f"model.quantization is {format_name!r}, but the formats are {', '.join(FORMATS)}")
    quant_format = cast(Callable[[], QuantFormat[object]], load_object(FORMATS[format_name]))()
    num_at_once = num_threads if quant_format.packs_with_one_thread else 1
    num_before = torch.get_num_threads()
    torch.set_num_threads(num_threads // num_at_once)
    try:
        return _exchange(model, quant_format, num_at_once)
    finally:
        torch.set_num_threads(num_before)


def _exchange(model: nn.Module, quant_format: QuantFormat[object], num_at_once: int) -> int:
    def pack(place: tuple[nn.Module, str]) -> bool:
        parent, name = place
        linear = getattr(parent, name)
        # without elements there is nothing to gain, and kernels refuse
        if not linear.weight.numel() or not quant_format.accepts(linear.weight):
            return False
        weight = linear.weight.detach()
        setattr(parent, name, QuantLinear(quant_format, quant_format.quantize(weight), linear.bias, weight.shape))
        return True

    # a subclass of nn.Linear may compute something else
    children = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    places = [(parent, name) for parent, name, child in children if type(child) is nn.Linear]
    del children  # which would keep every float matrix to the end
    with ThreadPoolExecutor(num_at_once) as pool:  # packing holds no interpreter lock
        return sum(pool.map(torch.no_grad()(pack), places))


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """The matrix in the order in which oneDNN's blocked kernels read it, in its own dtype: nothing is lost.

    Only where that is faster than torch's plain product. bfloat16 and float16: always, on a CPU that multiplies them.
    float32: from 16 MB up, where it doubles the speed of 2 to 64 rows; below, both run at the memory's speed.
    """

    kept_as: ClassVar[str] = ""
    packs_with_one_thread: ClassVar[bool] = False

    min_float32_elements: int = 1 << 22

    def accepts(self, weight: Tensor) -> bool:
        if weight.device.type != "cpu" or not torch._C._has_mkldnn:
            return False
        if weight.dtype == torch.float32:
            return weight.numel() >= self.min_float32_elements
        return can_pack(weight.dtype)

    def quantize(self, weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        return packed

    def dequantize(self, weight: Tensor) -> Tensor:
        return weight.to_dense()

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return out


class HalfFormat:
    """float16 weights under float32 activations and sums, by FBGEMM: half the bytes, and 2 to 5 times the speed of
    float32 up to 32 rows on a CPU without bfloat16.

    Bound: 2**-11 of each element, or 2**-25 where that is more. Rounding a bfloat16 checkpoint loses less than that.
    """

    kept_as: ClassVar[str] = "float16"
    packs_with_one_thread: ClassVar[bool] = True

    def __init__(self) -> None:
        if not has_float16_weights():
            raise ValueError('model.quantization fp16 needs FBGEMM, which this torch build lacks; use "none" or "int8"')

    def accepts(self, weight: Tensor) -> bool:
        if weight.device.type != "cpu":
            raise ValueError('model.quantization fp16 is for the CPU; set it to "none" on a GPU')
        low, high = weight.aminmax()  # not numbers, if the matrix has any, and then nothing is true of them
        largest = torch.finfo(torch.float16).max
        return bool(low > -largest) and bool(high < largest)

    def quantize(self, weight: Tensor) -> torch.ScriptObject:
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), None)
        return packed

    def dequantize(self, weight: torch.ScriptObject) -> Tensor:
        dense: Tensor = torch.ops.quantized.linear_unpack_fp16(weight)[0]
        return dense

    def matmul(self, x: Tensor, weight: torch.ScriptObject) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), weight)
        return out if x.dtype == torch.float32 else out.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Int8Weight:
    values: Tensor  # [out_features, in_features] int8
    scales: Tensor  # [out_features] in the dtype of the activations to come


@dataclass(frozen=True, slots=True)
class Int8Format:
    """int8 with a scale per output channel; `kernels.torch_cpu.int8_linear` states the bound.

    bfloat16 in a few rows has a kernel of its own where the CPU multiplies bfloat16. float32 is never rounded to it:
    that kernel would be up to twice as fast for one row, but then a batch's size would change its sequences' tokens.
    """

    kept_as: ClassVar[str] = "int8"
    packs_with_one_thread: ClassVar[bool] = False

    max_few_rows: int = 16
    scratch: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def accepts(self, weight: Tensor) -> bool:
        return weight.is_floating_point()

    def quantize(self, weight: Tensor) -> Int8Weight:
        values, scales = quantize_int8(weight)
        return Int8Weight(values, scales.to(weight.dtype))

    def dequantize(self, weight: Int8Weight) -> Tensor:
        dense: Tensor = dequantize_int8(weight.values, weight.scales)
        return dense

    def matmul(self, x: Tensor, weight: Int8Weight) -> Tensor:
        scales = weight.scales.to(x.dtype)
        out: Tensor
        if x.dtype == torch.bfloat16 and x.shape[0] <= self.max_few_rows and has_fast_bf16():
            out = int8_linear_few_rows(x, weight.values, scales)
        else:
            out = int8_linear(x, weight.values, scales, self._scratch(x))
        return out

    def _scratch(self, x: Tensor) -> Tensor:
        """Memory that all layers share: fresh memory would cost more than the product that it is for."""
        scratch = self.scratch.get(x.dtype)
        if scratch is None or scratch.numel() < x.shape[1]:
            size = max(SCRATCH_ELEMENTS, x.shape[1])
            with torch.inference_mode(False):  # made in the mode, it could not be written outside of it
                scratch = self.scratch[x.dtype] = torch.empty(size, dtype=x.dtype, device=x.device)
        return scratch


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has blocked products in `dtype` here."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


@cache
def has_fast_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16, AVX512-BF16 or AMX, and oneDNN uses them.

    With AVX512 alone oneDNN emulates them: it packs such a model, but float32 is as fast.
    """
    return can_pack(torch.bfloat16) and torch.cpu._is_avx512_bf16_supported()


def has_float16_weights() -> bool:
    """Whether torch has products of float32 with float16 weights here."""
    return "fbgemm" in torch.backends.quantized.supported_engines
