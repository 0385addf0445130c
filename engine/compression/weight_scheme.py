"""How the weights of a matrix are rounded: bits, groups that share a scale, zero points."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from engine.quantization.bit_packing import num_words

GROUP_SIZES = (128, 64, 32)  # that kernels of every peer have, from the largest
Observer = Literal["minmax", "mse"]
TensorShape = tuple[str, tuple[int, ...]]  # dtype as safetensors names it, shape


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """One format of matrices. bits: 8 with `is_float`, which is FP8 (e4m3)

    group_size: inputs that share a scale; None: all of an output
    observer: how a scale is found: from the largest weight of a group, or as the one with the least squared error
    """

    bits: int
    group_size: int | None = None
    is_symmetric: bool = True
    is_float: bool = False
    observer: Observer = "minmax"

    def for_inputs(self, num_inputs: int) -> WeightScheme:
        """The same in the largest groups, of this size or less, that rows of a matrix are made of."""
        if self.group_size is None or num_inputs % self.group_size == 0:
            return self
        sizes = [size for size in GROUP_SIZES if size < self.group_size and num_inputs % size == 0]
        return replace(self, group_size=sizes[0] if sizes else None)

    def num_groups(self, num_inputs: int) -> int:
        return 1 if self.group_size is None else num_inputs // self.group_size

    def tensors(self, shape: tuple[int, int], scales: str) -> dict[str, TensorShape]:
        """What stands for a matrix, by the last word of their names, in the order in which they are written.

        shape: [num_outputs, num_inputs]; scales: their dtype, BF16, F16 or F32
        """
        num_outputs, num_inputs = shape
        groups = self.num_groups(num_inputs)
        if self.is_float:
            return {"weight": ("F8_E4M3", shape), "weight_scale": (scales, (num_outputs, 1))}
        found: dict[str, TensorShape] = {
            "weight_packed": ("I32", (num_outputs, num_words(num_inputs, self.bits))),
            "weight_scale": (scales, (num_outputs, groups)),
            "weight_shape": ("I64", (2,)),
        }
        if not self.is_symmetric:
            found["weight_zero_point"] = ("I32", (num_words(num_outputs, self.bits), groups))
        return found

    def num_bytes(self, shape: tuple[int, int], scales: str = "BF16") -> int:
        """Of a matrix in a file."""
        return sum(WIDTHS[dtype] * math.prod(one) for dtype, one in self.tensors(shape, scales).values())

    @property
    def label(self) -> str:
        """For people."""
        kind = "fp8" if self.is_float else f"int{self.bits}"
        groups = "a scale for each output" if self.group_size is None else f"groups of {self.group_size}"
        return f"{kind}, {groups}{'' if self.is_symmetric else ', zero points'}"


WIDTHS = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
