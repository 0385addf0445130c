"""Weights of integers and scales as files may hold them, and what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.numba.core.formats import FLOAT8, GROUP, INTEGERS, QUADS, SUPER_GROUP, Levels


def random_levels(kind: int, num_rows: int, depth: int) -> Levels:
    """All levels there are, and scales of either sign, with which weights are about as large as one."""
    weights = INTEGERS[kind & ~QUADS]
    if weights.bits == 8:
        levels = torch.randint(-127, 128, (num_rows, depth)).to(torch.int8)
    else:
        levels = torch.randint(0, 1 << weights.bits, (num_rows, depth)).to(torch.uint8)
    shape = (num_rows, depth // GROUP, weights.num_factors)
    if not weights.is_two_level:
        dtype = getattr(torch, weights.scales)
        factors = torch.randn(shape) / weights.largest
        factors[..., weights.num_scales :] *= weights.largest
        if weights.has_zeros:
            factors[..., weights.num_scales :] = torch.randint(0, 1 << weights.bits, (*shape[:2], 1)).float()
        return Levels(kind & ~QUADS, levels, factors.to(dtype))
    small = torch.randint(-128, 128, shape).to(torch.int8)
    commons = torch.randn(num_rows, depth // SUPER_GROUP, 1 + weights.has_offsets) / 128
    commons[..., 0] /= weights.largest
    return Levels(kind & ~QUADS, levels, small, commons.half())


def random_float8(num_rows: int, depth: int) -> Levels:
    """All numbers of FP8 there are, those below the normal ones included, and scales of either sign."""
    bits = torch.randint(0, 254, (num_rows, depth))
    bits += (bits >= 127).int()  # less the two that are no numbers
    scales = torch.randn(num_rows, depth // GROUP, 1) / 448
    return Levels(FLOAT8, bits.to(torch.uint8), scales)


def weights_of(rows: Levels) -> Tensor:
    """What they stand for, in float32, one operation after the other."""
    if rows.kind == FLOAT8:
        scales = rows.factors.flatten(1).repeat_interleave(GROUP, 1)
        return rows.levels.view(torch.float8_e4m3fn).float() * scales
    weights, num_rows = INTEGERS[rows.kind], len(rows.levels)
    values = rows.levels.float() - weights.zero
    if weights.table:
        values = torch.tensor(weights.table).float()[rows.levels.long()]
    factors = rows.factors.float()
    if rows.commons is not None:
        per_group = rows.commons.float().repeat_interleave(SUPER_GROUP // GROUP, 1)
        factors = factors * per_group.repeat_interleave(weights.num_scales, 2)
    scales, offsets = factors[..., : weights.num_scales], factors[..., weights.num_scales :]
    offsets = -offsets * scales if weights.has_zeros else offsets
    scales = scales.reshape(num_rows, -1).repeat_interleave(weights.per_scale, 1)
    product = values * scales
    if not weights.has_offsets:
        return product
    return product + offsets.reshape(num_rows, -1).repeat_interleave(weights.per_scale, 1)
