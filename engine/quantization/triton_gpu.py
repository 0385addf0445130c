"""Weight formats of a GPU: codes and scales that Triton's kernels multiply with as they are.

`Int8Method` and `Int4Method` round floats while they are loaded. Whoever reads a checkpoint that is quantised already
hands its codes to `QuantizedMethod.keep_codes`, so that no float matrix lies between the file and the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from engine.quantization.linear import ALL_ROWS, KeptMatrix, LinearMethod, Shards
from kernels.reference.quantized import round_to_groups
from kernels.triton.configs import QuantizedConfig, chip_of, strict_quantized_config
from kernels.triton.quantized.matrix import QuantizedMatrix, Values, make_matrix

_PIECE = 1 << 24  # elements that are rounded at a time


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """A part of a matrix as a checkpoint has it quantised: the arguments of `make_matrix`, which says what they mean.

    codes: [num_outputs, num_inputs]; scales, zeros, offsets: [num_outputs, num_groups]; order: [num_inputs], the input
    that each column of codes is for (act-order: sort the columns by group, and give their numbers)
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    order: Tensor | None = None


class QuantizedMethod(LinearMethod[QuantizedMatrix]):
    """Products with matrices that are there as codes and scales. has_one_config: for any number of rows

    The result of a row is the same in every run. Its last bits may change with the number of rows, by which tiles are
    chosen and inputs are split; with one config it depends on the row alone.
    """

    def __init__(self, num_threads: int = 1, *, has_one_config: bool = False) -> None:
        """num_threads: packing is the device's work"""
        self.has_one_config = has_one_config

    def keep_codes(
        self,
        layer: KeptMatrix,
        parts: Sequence[StoredCodes],
        *,
        bits: int,
        group_size: int,
        values: Values | Tensor = "integer",
        channel_scales: Tensor | None = None,
    ) -> None:
        """Makes a layer's matrix of the codes of all its parts, from top to bottom, on the default device.

        bits, group_size, values, channel_scales: as of `make_matrix`. ValueError for parts that do not fit together, or
        that no kernel multiplies with.
        """
        device = torch.get_default_device()
        num_codes = sum(len(part.codes) for part in parts)
        if num_codes != layer.spec.num_outputs or any(part.codes.shape[1:] != (layer.in_features,) for part in parts):
            shapes = ", ".join(str(tuple(part.codes.shape)) for part in parts)
            raise ValueError(f"codes of {shapes} for a matrix of {layer.spec.shape}")
        layer.keep(
            make_matrix(
                torch.cat([part.codes.to(device) for part in parts]),
                torch.cat([part.scales.to(device) for part in parts]),
                _stacked([part.zeros for part in parts], "zeros", device),
                bits=bits,
                group_size=group_size,
                order=_common_order([part.order for part in parts], device),
                values=values,
                offsets=_stacked([part.offsets for part in parts], "offsets", device),
                channel_scales=channel_scales,
            )
        )

    def pack(self, shards: Shards) -> QuantizedMatrix | None:
        """None: floats stay floats."""
        return None

    def apply(self, x: Tensor, weight: QuantizedMatrix, bias: Tensor | None) -> Tensor:
        from kernels.triton.quantized.linear import quantized_linear  # needs triton

        return quantized_linear(x, weight, bias, config=self._config(x))

    def with_independent_rows(self) -> QuantizedMethod:
        return type(self)(has_one_config=True)

    def dense(self, weight: QuantizedMatrix, rows: slice = ALL_ROWS) -> Tensor:
        return weight.dense(rows)

    def describe(self, weight: QuantizedMatrix) -> str:
        name = (
            f"int{weight.bits}" if weight.values == "integer" else "fp4" if weight.values == "e2m1" else "table of 16"
        )
        return f"{name}, {f'groups of {weight.group_size}' if weight.group_size else 'rows'}"

    def _config(self, x: Tensor) -> QuantizedConfig | None:
        return strict_quantized_config(x.dtype, chip=chip_of(x.device)) if self.has_one_config else None


class RoundingMethod(QuantizedMethod):
    """Rounds floats to the nearest codes while a model is loaded.

    bits: of layers; bits_of_output: of the logits' matrix; group_sizes: the first that rows are made of, else a row is
    one group; scales are bfloat16, whose range holds those of any weights
    """

    bits: ClassVar[int]
    bits_of_output: ClassVar[int] = 8
    group_sizes: ClassVar[dict[int, tuple[int, ...]]] = {8: (128, 64), 4: (32, 16)}  # by bits

    @torch.no_grad()
    def pack(self, shards: Shards) -> QuantizedMatrix | None:
        """None for elements that are infinite or no numbers: they would be lost, and their groups with them."""
        bits = self.bits_of_output if shards.spec.is_output else self.bits
        num_outputs, num_inputs = shards.spec.shape
        group_size = next((size for size in self.group_sizes[bits] if num_inputs % size == 0), num_inputs)
        device = torch.get_default_device()
        codes = torch.empty(num_outputs, num_inputs, dtype=torch.uint8, device=device)
        num_groups = num_inputs // group_size
        scales = torch.empty(num_outputs, num_groups, dtype=torch.bfloat16, device=device)
        zeros = torch.empty(num_outputs, num_groups, dtype=torch.uint8, device=device)
        step = max(1, _PIECE // num_inputs)
        for start in range(0, num_outputs, step):
            rows = slice(start, min(start + step, num_outputs))
            floats = shards.rows(rows.start, rows.stop).to(device)
            if not bool(floats.isfinite().all()):
                return None
            codes[rows], scales[rows], zeros[rows] = round_to_groups(
                floats, bits=bits, group_size=group_size, is_symmetric=bits == 8, scale_dtype=torch.bfloat16
            )
        return make_matrix(codes, scales, zeros, bits=bits, group_size=group_size)


class Int8Method(RoundingMethod):
    """8 bits, symmetric, in groups of 128. Bound: half a step, a 254th of the largest magnitude of a group."""

    bits = 8


class Int4Method(RoundingMethod):
    """4 bits and a zero in groups of 32. Bound: a step, a 15th of the range of a group; logits have 8 bits."""

    bits = 4


def _stacked(parts: list[Tensor | None], name: str, device: torch.device) -> Tensor | None:
    there = [part.to(device) for part in parts if part is not None]
    if there and len(there) < len(parts):
        raise ValueError(f"some parts of a matrix have {name}, and others have none")
    return torch.cat(there) if there else None


def _common_order(orders: list[Tensor | None], device: torch.device) -> Tensor | None:
    first = orders[0]
    if any((order is None) != (first is None) for order in orders):
        raise ValueError("some parts of a matrix have their inputs in another order, and others have not")
    if first is None:
        return None
    if not all(order is not None and torch.equal(order, first) for order in orders):
        raise ValueError("the parts of a matrix have their inputs in different orders, but one product reads them once")
    return first.to(device)
