"""Weight formats of a GPU: codes and scales that Triton's kernels multiply with as they are.

`Int8Method`, `Int4Method` and `Fp8Method` round floats while they are loaded. What a checkpoint has quantised already
is kept as it is (`stored_codes`, `matrix_of_scaled`), in so many bits or fewer. So no float matrix lies between the
file and the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from engine.quantization.linear import ALL_ROWS, LinearMethod, LinearSpec, Shards
from engine.quantization.stored_codes import check_parts, kept_as_stored
from engine.quantization.stored_integers import ScaledFloats
from kernels.reference.quantized import quantize_rows, round_to_groups
from kernels.triton.configs import chip_of, strict_quantized_config, strict_scaled_config
from kernels.triton.quantized.matrix import QuantizedMatrix, make_matrix
from kernels.triton.quantized.scaled_matrix import ScaledMatrix, make_scaled_matrix, with_rows_as_they_are

GpuMatrix = QuantizedMatrix | ScaledMatrix
_PIECE = 1 << 24  # elements that are rounded at a time
_FIRST_FP8 = (8, 9)  # compute capability of the first chips that multiply FP8


def matrix_of_scaled(
    spec: LinearSpec, parts: Sequence[tuple[Tensor, Tensor]], *, quantizes_rows: bool = True
) -> GpuMatrix:
    """A layer's matrix of parts in int8 or FP8, (values, scales) of each, as of `make_scaled_matrix`.

    quantizes_rows: activations meet them in their format, where the chip multiplies that; else in their own dtype.
    ValueError for parts that do not fit together; blocks of scales do only if parts are made of whole blocks.
    """
    device = torch.get_default_device()
    check_parts(spec, [values for values, _ in parts])
    matrices = [make_scaled_matrix(values.to(device), scales.to(device)) for values, scales in parts]
    if any(one.is_blocked for one in matrices):
        if not all(one.is_blocked and len(one.values) % 128 == 0 for one in matrices[:-1]):
            raise ValueError("the parts of a matrix are not made of whole blocks of 128 outputs")
        scales = [one.scales for one in matrices]
    else:
        scales = [one.scales.expand(len(one.values), 1) for one in matrices]
    whole = make_scaled_matrix(torch.cat([one.values for one in matrices]), torch.cat(scales))
    is_scaled = quantizes_rows and (whole.values.dtype == torch.int8 or has_float8_products(device))
    return whole if is_scaled else with_rows_as_they_are(whole)


class QuantizedMethod(LinearMethod[GpuMatrix]):
    """Products with matrices that are there as codes and scales. has_one_config: for any number of rows

    The result of a row is the same in every run. Its last bits may change with the number of rows, by which tiles are
    chosen and inputs are split; with one config it depends on the row alone.
    """

    has_experts = True

    def __init__(self, num_threads: int = 1, *, has_one_config: bool = False) -> None:
        """num_threads: packing is the device's work"""
        self.has_one_config = has_one_config

    def pack(self, shards: Shards) -> GpuMatrix | None:
        """What a checkpoint has quantised. None for floats, and where no kernel multiplies it: they stay floats."""
        scaled = [(part.values, part.scales) for part in shards.tensors if isinstance(part, ScaledFloats)]
        if len(scaled) < len(shards.tensors):
            return kept_as_stored(shards.spec, shards.tensors, max_bits=8)
        try:
            return matrix_of_scaled(shards.spec, scaled, quantizes_rows=False)
        except ValueError:  # blocks of scales across the border of two parts
            return None

    def apply(self, x: Tensor, weight: GpuMatrix, bias: Tensor | None) -> Tensor:
        chip = chip_of(x.device)
        if isinstance(weight, ScaledMatrix):
            from kernels.triton.quantized.scaled import scaled_linear  # needs triton

            return scaled_linear(
                x, weight, bias, config=strict_scaled_config(chip=chip) if self.has_one_config else None
            )
        from kernels.triton.quantized.linear import quantized_linear

        config = strict_quantized_config(x.dtype, chip=chip) if self.has_one_config else None
        return quantized_linear(x, weight, bias, config=config)

    def mix_experts(self, x: Tensor, gate_up: GpuMatrix, down: GpuMatrix, weights: Tensor, experts: Tensor) -> Tensor:
        from kernels.triton.layers.quantized_moe import mix_quantized_experts

        assert isinstance(gate_up, QuantizedMatrix), "of experts, rows are not quantised"
        assert isinstance(down, QuantizedMatrix), "of experts, rows are not quantised"
        return mix_quantized_experts(x, gate_up, down, weights, experts)

    def with_independent_rows(self) -> QuantizedMethod:
        return type(self)(has_one_config=True)

    def dense(self, weight: GpuMatrix, rows: slice = ALL_ROWS) -> Tensor:
        return weight.dense(rows)

    def describe(self, weight: GpuMatrix) -> str:
        if isinstance(weight, ScaledMatrix):
            name = "int8" if weight.values.dtype == torch.int8 else "fp8"
            return f"{name} by {name}, {'blocks' if weight.is_blocked else 'rows'}"
        names = {"integer": f"int{weight.bits}", "e2m1": "fp4", "e4m3": "fp8", "table": "a table of 16"}
        return f"{names[weight.values]}, {f'groups of {weight.group_size}' if weight.group_size else 'rows'}"


class RoundingMethod(QuantizedMethod):
    """Rounds floats to the nearest codes while a model is loaded.

    bits: of layers; the logits' matrix has 8; group_sizes: by bits, the first that rows are made of, else a row is one
    group; scales are bfloat16, whose range holds those of any weights
    """

    bits: ClassVar[int]
    group_sizes: ClassVar[dict[int, tuple[int, ...]]] = {8: (128, 64), 4: (32, 16)}

    @torch.no_grad()
    def pack(self, shards: Shards) -> GpuMatrix | None:
        """What a checkpoint has in so many bits or fewer, as it is. None for floats that are infinite or no numbers:
        they would be lost, and their groups with them.
        """
        bits = 8 if shards.spec.is_output else self.bits
        kept = kept_as_stored(shards.spec, shards.tensors, max_bits=bits)
        return self._rounded(shards, bits) if kept is None else kept

    def _rounded(self, shards: Shards, bits: int) -> QuantizedMatrix | None:
        num_outputs, num_inputs = shards.spec.shape
        group_size = next((size for size in self.group_sizes[bits] if num_inputs % size == 0), num_inputs)
        device = torch.get_default_device()
        codes = torch.empty(num_outputs, num_inputs, dtype=torch.uint8, device=device)
        num_groups = num_inputs // group_size
        scales = torch.empty(num_outputs, num_groups, dtype=torch.bfloat16, device=device)
        zeros = torch.empty(num_outputs, num_groups, dtype=torch.uint8, device=device)
        for rows in _pieces(num_outputs, num_inputs):
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


class Fp8Method(RoundingMethod):
    """FP8 (e4m3) with a scale for each output, by activations in FP8 with a scale for each row.

    Bound of a weight: a 16th of its magnitude, or 2**-10 448ths of its row's largest where that is more. The logits'
    matrix is that of int8. Chips that do not multiply FP8 take activations as they are; experts stay in floats.
    """

    has_experts = False
    bits = 8

    @torch.no_grad()
    def pack(self, shards: Shards) -> GpuMatrix | None:
        """None for elements that are infinite or no numbers."""
        if shards.spec.is_output:
            return self._rounded(shards, 8)
        device = torch.get_default_device()
        values = torch.empty(shards.spec.shape, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(shards.spec.num_outputs, 1, device=device)
        for rows in _pieces(*shards.spec.shape):
            floats = shards.rows(rows.start, rows.stop).to(device)
            if not bool(floats.isfinite().all()):
                return None
            values[rows], scales[rows, 0] = quantize_rows(floats, torch.float8_e4m3fn)
        matrix = make_scaled_matrix(values, scales)
        return matrix if has_float8_products(device) else with_rows_as_they_are(matrix)


def has_float8_products(device: torch.device) -> bool:
    """Whether Triton multiplies FP8 there; its interpreter does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _FIRST_FP8


def _pieces(num_outputs: int, num_inputs: int) -> list[slice]:
    """Rows that are rounded at a time."""
    step = max(1, _PIECE // num_inputs)
    return [slice(start, min(start + step, num_outputs)) for start in range(0, num_outputs, step)]
