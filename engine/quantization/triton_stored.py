"""A checkpoint's quantised matrices on a GPU: its codes and scales, as they are, for Triton's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from engine.quantization.linear import Shards
from engine.quantization.stored_integers import FourBitFloats, ScaledFloats, StoredIntegers, even_groups
from engine.quantization.stored_levels import StoredLevels
from engine.quantization.triton_gpu import GpuMatrix, QuantizedMethod, StoredCodes, matrix_of_codes, matrix_of_scaled

Parts = Sequence[Tensor | StoredLevels]


class StoredMethod(QuantizedMethod):
    """What a file has in codes stays so, whatever is floats too: `model.quantization: none`.

    Parts of one matrix are one matrix of codes, if they have bits, groups and order in common; else they become floats.
    Activations stay as they are, also where a checkpoint asks for them in 8 bits.
    """

    @torch.no_grad()
    def pack(self, shards: Shards) -> GpuMatrix | None:
        parts = shards.tensors
        try:
            if _are_integers(parts):
                return _of_integers(shards, parts)
            if _are_four_bits(parts):
                return _of_four_bits(shards, parts)
            if _are_scaled(parts):
                pairs = [(part.values, part.scales) for part in parts]
                return matrix_of_scaled(shards.spec, pairs, quantizes_rows=False)
        except ValueError:  # groups, or parts beside each other, for which there is no kernel
            return None
        return None


def _are_integers(parts: Parts) -> TypeGuard[Sequence[StoredIntegers]]:
    return all(isinstance(part, StoredIntegers) for part in parts)


def _are_four_bits(parts: Parts) -> TypeGuard[Sequence[FourBitFloats]]:
    return all(isinstance(part, FourBitFloats) for part in parts)


def _are_scaled(parts: Parts) -> TypeGuard[Sequence[ScaledFloats]]:
    return all(isinstance(part, ScaledFloats) for part in parts)


def _of_integers(shards: Shards, parts: Sequence[StoredIntegers]) -> GpuMatrix | None:
    first, depth = parts[0], shards.spec.num_inputs
    size, rest = divmod(depth, first.scales.shape[1])
    groups = even_groups(depth, size)
    alike = [
        (part.bits, part.scales.dtype, part.factor) == (first.bits, first.scales.dtype, first.factor)
        and torch.equal(part.group, groups)
        for part in parts
    ]
    if rest or not all(alike):
        return None
    codes = [_codes_of(part) for part in parts]
    factor = None if first.factor == 1.0 else torch.tensor([first.factor], device="cpu")
    return matrix_of_codes(shards.spec, codes, bits=first.bits, group_size=size, channel_scales=factor)


def _codes_of(part: StoredIntegers) -> StoredCodes:
    """With codes from 0 on."""
    lowest, num_rows = 1 << (part.bits - 1) if part.is_signed else 0, part.shape[0]
    codes = part.read_levels(0, num_rows)
    if lowest:
        codes = codes.to(torch.int16).add_(lowest).to(torch.uint8)
    zeros = part.zeros + lowest
    if isinstance(zeros, int):
        zeros = torch.full(part.scales.shape, zeros, dtype=torch.int16, device="cpu")
    return StoredCodes(codes, part.scales.contiguous(), zeros, order=part.order)


def _of_four_bits(shards: Shards, parts: Sequence[FourBitFloats]) -> GpuMatrix:
    codes = [StoredCodes(part.codes(0, part.shape[0]), part.scales * 2) for part in parts]
    group_size = shards.spec.num_inputs // parts[0].scales.shape[1]
    return matrix_of_codes(shards.spec, codes, bits=4, group_size=group_size, values="e2m1")
