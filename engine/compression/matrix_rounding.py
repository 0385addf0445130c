"""Matrices to the nearest integers or small floats, as the compressed-tensors library lays them out.

With the observer "minmax", values are those that `model.quantization` keeps on a GPU while it loads the same floats
(`kernels.reference.quantized.round_to_groups`). "mse" tries narrower ranges of each group, in which the largest weight
is cut off but all others have smaller steps, and takes the one with the least squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compression.weight_scheme import WeightScheme
from engine.quantization.bit_packing import pack_bits
from kernels.reference.quantized import LARGEST, dequantize, round_to_groups

_PIECE = 1 << 19  # elements that are rounded at a time: what lies between two operations stays in the CPU's cache
_SHRUNK = tuple(1 - 0.02 * step for step in range(1, 21))  # ranges that "mse" tries beside the whole one
SCALES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(slots=True)
class RoundingError:
    """Sums over weights: the squares of what rounding changed, and of what was there."""

    changed: float = 0.0
    total: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        self.changed += float((after - before).square().sum(dtype=torch.float64))
        self.total += float(before.square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        """Root mean square, of that of the weights."""
        return 0.0 if self.total == 0 else (self.changed / self.total) ** 0.5


@torch.no_grad()
def round_matrix(
    weight: Tensor, scheme: WeightScheme, *, scales: str, error: RoundingError | None = None
) -> dict[str, Tensor]:
    """The tensors that `scheme.tensors` lists.

    weight: [num_outputs, num_inputs], any floats, of which a few rows are float32 at a time; scales: their dtype
    error: what is added up. ValueError for elements that are infinite or no numbers: their groups would be lost.
    """
    num_outputs, num_inputs = weight.shape
    pieces = []
    step = max(1, _PIECE // num_inputs)
    for start in range(0, num_outputs, step):
        rows = weight[start : start + step].float()
        if not bool(rows.isfinite().all()):
            raise ValueError("it has elements that are infinite or no numbers")
        pieces.append(_round_rows(rows, scheme, SCALES[scales], error))
    found = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    if "zeros" in found:
        found["weight_zero_point"] = pack_bits(found.pop("zeros").T.contiguous(), scheme.bits).T.contiguous()
    if not scheme.is_float:
        found["weight_shape"] = torch.tensor([num_outputs, num_inputs])
    return found


def rounded_floats(weight: Tensor, scheme: WeightScheme, *, scales: str) -> Tensor:
    """What a matrix stands for once it is rounded, float32 [num_outputs, num_inputs]."""
    step = max(1, _PIECE // weight.shape[1])
    rows = [weight[start : start + step].float() for start in range(0, len(weight), step)]
    return torch.cat([dequantize(*_codes(one, scheme, SCALES[scales])) for one in rows])


def _round_rows(
    rows: Tensor, scheme: WeightScheme, dtype: torch.dtype, error: RoundingError | None
) -> dict[str, Tensor]:
    if scheme.is_float:
        values, factors = _floats(rows, dtype)
        if error is not None:
            error.add(rows, values.float() * factors.float())
        return {"weight": values, "weight_scale": factors}
    codes, factors, zeros = _codes(rows, scheme, dtype)
    if error is not None:
        error.add(rows, dequantize(codes, factors, zeros))
    found = {"weight_packed": pack_bits(codes, scheme.bits), "weight_scale": factors}
    return found if scheme.is_symmetric else found | {"zeros": zeros}


def _floats(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = LARGEST[torch.float8_e4m3fn]
    scales = (rows.abs().amax(1, keepdim=True) / largest).to(dtype).clamp(min=torch.finfo(dtype).tiny)
    return (rows / scales.float()).clamp(-largest, largest).to(torch.float8_e4m3fn), scales


def _codes(rows: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [n, num_inputs], scales in `dtype` and zeros uint8, [n, num_groups]."""
    size = rows.shape[1] if scheme.group_size is None else scheme.group_size
    bits, is_symmetric = scheme.bits, scheme.is_symmetric
    codes, scales, zeros = round_to_groups(
        rows, bits=bits, group_size=size, is_symmetric=is_symmetric, scale_dtype=dtype
    )
    if scheme.observer == "minmax":
        return codes, scales, zeros
    groups = rows.view(len(rows), -1, size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    grouped = codes.view(groups.shape)
    least = _squared_error(groups, grouped, scales, zeros)
    for shrunk in _SHRUNK:
        tried = _scales(low * shrunk, high * shrunk, bits, is_symmetric).to(dtype).clamp(min=torch.finfo(dtype).tiny)
        tried_codes, tried_zeros = _nearest(groups, tried.float(), low * shrunk, bits, is_symmetric)
        error = _squared_error(groups, tried_codes, tried, tried_zeros)
        is_better = error < least
        least = torch.where(is_better, error, least)
        scales, zeros = torch.where(is_better, tried, scales), torch.where(is_better, tried_zeros, zeros)
        grouped = torch.where(is_better[:, :, None], tried_codes, grouped)
    return grouped.flatten(1), scales, zeros


def _scales(low: Tensor, high: Tensor, bits: int, is_symmetric: bool) -> Tensor:
    span, steps = (torch.maximum(-low, high), 2 ** (bits - 1) - 1) if is_symmetric else (high - low, 2**bits - 1)
    scales: Tensor = span / steps
    return scales


def _nearest(groups: Tensor, scales: Tensor, low: Tensor, bits: int, is_symmetric: bool) -> tuple[Tensor, Tensor]:
    most, half = 2**bits - 1, 2 ** (bits - 1)
    zeros = torch.full_like(scales, half) if is_symmetric else (-low / scales).round().clamp_(0, most)
    codes = (groups / scales[:, :, None]).round_().add_(zeros[:, :, None]).clamp_(0, most)
    return codes.to(torch.uint8), zeros.to(torch.uint8)


def _squared_error(groups: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """[n, num_groups]"""
    values = (codes.float() - zeros.float()[:, :, None]).mul_(scales.float()[:, :, None])
    return values.sub_(groups).square_().sum(2)
