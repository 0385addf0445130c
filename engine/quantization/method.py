"""The formats that weight matrices are kept in, and torch's of them on a CPU.

What a format costs and gains is measured by `python -m loadtest.micro.linear`; the choices below cite it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor

from engine.config import Activations
from engine.lazy_import import load_object
from engine.quantization.linear import ALL_ROWS, LinearMethod, LinearMethods, LinearSpec, Shards
from kernels.torch_cpu.int8_linear import (
    SCRATCH_ELEMENTS,
    dequantize_int8,
    int8_linear,
    int8_linear_few_rows,
    quantize_int8,
)

W = TypeVar("W")
_PIECE = 1 << 20  # elements that are quantised at a time
_EIGHT_BITS, _EIGHT_BITS_AT_MOST = 1.0625, 1.125  # bytes of a weight, scales included


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """A value of `model.quantization`.

    place: the "module:Class" of its LinearMethod; num_bytes, output, experts: of a weight, of one of the output layer
    and of one of an expert, at most, None: as in the model's dtype; scratch: of a weight, beside it and its floats,
    while a matrix is packed
    """

    place: str
    num_bytes: float | None = None
    output: float | None = None
    experts: float | None = None
    scratch: int = 0
    meaning: str = ""


_OF_TORCH, _COMPILED = "engine.quantization.method", "engine.quantization.numba_cpu"
_TRITON = "engine.quantization.triton_gpu"
FORMATS = {
    "none": WeightFormat(f"{_OF_TORCH}:PackedMethod"),
    "fp16": WeightFormat(f"{_OF_TORCH}:HalfMethod", 2, 2, scratch=4),
    "int8": WeightFormat(f"{_OF_TORCH}:Int8Method", 1.0625, 1.0625),
}
COMPILED_FORMATS = {  # whose module is imported only where it runs
    "none": WeightFormat(
        f"{_COMPILED}:ExactMethod",
        meaning="bfloat16, float16 or float32, whichever holds every weight of a matrix as it is",
    ),
    "fp16": WeightFormat(
        f"{_COMPILED}:HalfMethod", 2, 2, 2,
        meaning="float16, or what is smaller and holds every weight: bfloat16, or the integers of a GGUF file",
    ),
    "int8": WeightFormat(
        f"{_COMPILED}:Int8Method", 1.0625, 1.0625, 1.0625, meaning="8 bits and a scale for each 32 weights"
    ),
    "int4": WeightFormat(
        f"{_COMPILED}:Int4Method", 0.625, 1.0625, 0.625,
        meaning="4 bits, a scale and an offset for each 32 weights; the output layer has 8 bits",
    ),
}  # fmt: skip
TRITON_FORMATS = {
    "none": FORMATS["none"],
    "fp16": FORMATS["fp16"],
    "stored": WeightFormat(
        f"{_TRITON}:QuantizedMethod",
        meaning="what a checkpoint has quantised in up to 8 bits, as it is, and floats as floats",
    ),
    "int8": WeightFormat(
        f"{_TRITON}:Int8Method", 1.0625, 1.0625, 1.0625, scratch=1,
        meaning="8 bits and a scale for each 128 weights, or 64 where rows are not made of 128",
    ),
    "int4": WeightFormat(
        f"{_TRITON}:Int4Method", 0.625, 1.0625, 0.625, scratch=1,
        meaning="4 bits, a scale and a zero for each 32 weights; the output layer has 8 bits",
    ),
    "fp8": WeightFormat(
        f"{_TRITON}:Fp8Method", 1.01, 1.0625, scratch=1,
        meaning="FP8 and a scale for each output, as are activations for each row; the output layer has 8-bit integers",
    ),
}  # fmt: skip
_FORMATS_OF = {"torch": FORMATS, "numba": COMPILED_FORMATS, "triton": TRITON_FORMATS}


def most_stored(num_bytes: float) -> float:
    """Bytes of a weight that a checkpoint's own format may take to be kept where floats become one of so many: 8 bits
    are 8 bits, with zero points or as FP8 too."""
    return _EIGHT_BITS_AT_MOST if num_bytes == _EIGHT_BITS else num_bytes


def formats_of(kernels: str) -> Mapping[str, WeightFormat]:
    """Those that layers of `device.kernels` have."""
    return _FORMATS_OF[kernels]


def make_methods(
    formats: Mapping[str, WeightFormat],
    name: str,
    *,
    num_threads: int = 1,
    keeps_tables: bool = False,
    activations: Activations = "int16",
) -> LinearMethods:
    """Those of a format. num_threads: what may pack; activations: others than int16 have compiled formats only.
    ValueError for one that does not exist or cannot run here.
    """
    if name not in formats:
        raise ValueError(f"model.quantization is {name!r}, but the formats are {', '.join(formats)}")
    make = cast(Callable[..., LinearMethod[object]], load_object(formats[name].place))
    options = {} if activations == "int16" else {"activations": activations}
    return LinearMethods(make(num_threads, **options), keeps_tables=keeps_tables)


class TorchMethod(LinearMethod[W]):
    """A method of torch's layers: the bias is added to the product."""

    def __init__(self, num_threads: int = 1) -> None:
        """num_threads: torch's own setting is what counts here"""

    def apply(self, x: Tensor, weight: W, bias: Tensor | None) -> Tensor:
        out = self.matmul(x, weight)
        return out if bias is None else out.add_(bias)

    @abstractmethod
    def matmul(self, x: Tensor, weight: W) -> Tensor:
        """As `apply`, without a bias."""


class PackedMethod(TorchMethod[Tensor]):
    """The matrix in the order in which oneDNN's blocked kernels read it, in its own dtype: nothing is lost.

    Only where that is faster than torch's plain product. bfloat16 and float16: always, on a CPU that multiplies them.
    float32: from 16 MB up, where it doubles the speed of 2 to 64 rows; below, both run at the memory's speed.
    """

    def __init__(self, num_threads: int = 1, *, min_float32_elements: int = 1 << 22) -> None:
        super().__init__(num_threads)
        self.min_float32_elements = min_float32_elements

    def accepts(self, spec: LinearSpec, dtype: torch.dtype, device: torch.device) -> bool:
        if device.type != "cpu" or not torch._C._has_mkldnn:
            return False
        if dtype == torch.float32:
            return spec.num_outputs * spec.num_inputs >= self.min_float32_elements
        return can_pack(dtype)

    def pack(self, shards: Shards) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(shards.take_whole().contiguous(), 1)
        return packed

    def dense(self, weight: Tensor, rows: slice = ALL_ROWS) -> Tensor:
        return weight.to_dense()[rows]

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return out

    def describe(self, weight: Tensor) -> str:
        return str(weight.dtype).removeprefix("torch.")


class HalfMethod(TorchMethod[torch.ScriptObject]):
    """float16 weights under float32 activations and sums, by FBGEMM: half the bytes, and 2 to 5 times the speed of
    float32 up to 32 rows on a CPU without bfloat16.

    Bound: 2**-11 of each element, or 2**-25 where that is more. Rounding a bfloat16 checkpoint loses less than that.
    """

    packs_with_one_thread: ClassVar[bool] = True

    def __init__(self, num_threads: int = 1) -> None:
        super().__init__(num_threads)
        if not has_float16_weights():
            raise ValueError('model.quantization fp16 needs FBGEMM, which this torch build lacks; use "none" or "int8"')

    def accepts(self, spec: LinearSpec, dtype: torch.dtype, device: torch.device) -> bool:
        if device.type != "cpu":
            raise ValueError('model.quantization fp16 is for the CPU; set it to "none" on a GPU')
        return True

    def pack(self, shards: Shards) -> torch.ScriptObject | None:
        """None for elements beyond float16, infinite, or no numbers."""
        weight = shards.take_whole()
        low, high = weight.aminmax()  # not numbers, if the matrix has any, and then nothing is true of them
        largest = torch.finfo(torch.float16).max
        if not (bool(low > -largest) and bool(high < largest)):
            shards.tensors.append(weight)
            return None
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), None)
        return packed

    def dense(self, weight: torch.ScriptObject, rows: slice = ALL_ROWS) -> Tensor:
        dense: Tensor = torch.ops.quantized.linear_unpack_fp16(weight)[0]
        return dense[rows]

    def matmul(self, x: Tensor, weight: torch.ScriptObject) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), weight)
        return out if x.dtype == torch.float32 else out.to(x.dtype)

    def describe(self, weight: torch.ScriptObject) -> str:
        return "float16"


@dataclass(frozen=True, slots=True)
class Int8Weight:
    values: Tensor  # [num_outputs, num_inputs] int8
    scales: Tensor  # [num_outputs] in the dtype of the activations to come; float32 for float16


class Int8Method(TorchMethod[Int8Weight]):
    """int8 with a scale per output channel; `kernels.torch_cpu.int8_linear` states the bound.

    bfloat16 in a few rows has a kernel of its own where the CPU multiplies bfloat16. float32 is never rounded to it:
    that kernel would be up to twice as fast for one row, but then a batch's size would change its sequences' tokens.
    """

    max_few_rows = 16

    def __init__(self, num_threads: int = 1) -> None:
        super().__init__(num_threads)
        self._scratch_of: dict[torch.dtype, Tensor] = {}

    def accepts(self, spec: LinearSpec, dtype: torch.dtype, device: torch.device) -> bool:
        return dtype.is_floating_point

    def pack(self, shards: Shards) -> Int8Weight | None:
        """None for elements that are infinite or no numbers: they would be lost, and their rows with them."""
        num_outputs, num_inputs = shards.spec.shape
        device = torch.get_default_device()
        values = torch.empty((num_outputs, num_inputs), dtype=torch.int8, device=device)
        scales = torch.empty(num_outputs, dtype=_dtype_of_scales(shards.dtype), device=device)
        step = max(1, _PIECE // num_inputs)
        for start in range(0, num_outputs, step):  # rows are independent, and few of them leave little to free
            rows = slice(start, min(start + step, num_outputs))
            floats = shards.rows(rows.start, rows.stop).to(device)
            if not bool(floats.isfinite().all()):
                return None
            found, factors = quantize_int8(floats)
            values[rows], scales[rows] = found, factors.to(scales.dtype)
        return Int8Weight(values, scales)

    def dense(self, weight: Int8Weight, rows: slice = ALL_ROWS) -> Tensor:
        dense: Tensor = dequantize_int8(weight.values[rows], weight.scales[rows])
        return dense

    def matmul(self, x: Tensor, weight: Int8Weight) -> Tensor:
        scales = weight.scales.to(_dtype_of_scales(x.dtype))
        out: Tensor
        if x.dtype == torch.bfloat16 and x.shape[0] <= self.max_few_rows and has_fast_bf16():
            out = int8_linear_few_rows(x, weight.values, scales)
        else:
            out = int8_linear(x, weight.values, scales, self._scratch(x))
        return out

    def describe(self, weight: Int8Weight) -> str:
        return "int8"

    def _scratch(self, x: Tensor) -> Tensor:
        """Memory that all layers share: fresh memory would cost more than the product that it is for."""
        scratch = self._scratch_of.get(x.dtype)
        if scratch is None or scratch.numel() < x.shape[1]:
            size = max(SCRATCH_ELEMENTS, x.shape[1])
            with torch.inference_mode(False):  # made in the mode, it could not be written outside of it
                scratch = self._scratch_of[x.dtype] = torch.empty(size, dtype=x.dtype, device=x.device)
        return scratch


def _dtype_of_scales(dtype: torch.dtype) -> torch.dtype:
    """Of int8 weights under activations of `dtype`: float16 has no room for small ones."""
    return torch.float32 if dtype == torch.float16 else dtype


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
