"""A quantised matrix as the kernels take it, and how one is made of what checkpoints hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.reference.quantized import E2M1, dequantize
from kernels.triton.quantized.packing import PLANES, pack_codes, unpack_codes

GROUP_SIZES = (16, 32, 64, 128)
Values = Literal["integer", "e2m1", "e4m3", "table"]
Scales = Literal["float16", "bfloat16", "float32", "e4m3", "e8m0"]
_SCALES: dict[torch.dtype, Scales] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e8m0fnu: "e8m0",
}


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A matrix of codes and scales: row n, input k is value(code) * scale + offset of the group of k, times n's own.

    words: codes as `packing` has them
    scales: [num_groups, num_outputs]: int32, with a 16-bit scale in the lower half and the zero in the upper one, or
        float32, or the 8 bits of e4m3 and e8m0 as uint8; zeros of the others are 2**(bits - 1)
    offsets: [num_groups, num_outputs] float32, with scales in float32
    channel_scales: [num_outputs] float32, of rows
    order: [num_inputs] int64, the input that each column of codes is for; None: in order
    table: [16] float32, values of codes
    group_size: inputs of a group; 0: all
    """

    words: Tensor
    scales: Tensor
    bits: int
    num_inputs: int
    group_size: int
    scale_kind: Scales
    values: Values = "integer"
    offsets: Tensor | None = None
    channel_scales: Tensor | None = None
    order: Tensor | None = None
    table: Tensor | None = None

    @property
    def num_outputs(self) -> int:
        return self.words.shape[-2]

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_outputs, self.num_inputs

    @property
    def nbytes(self) -> int:
        tensors = (self.words, self.scales, self.offsets, self.channel_scales, self.order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Those rows of the matrix, [num_rows, num_inputs] float32, their inputs in order."""
        codes = unpack_codes(self.words, self.num_inputs, self.bits, rows)
        scales, zeros = self._scales(rows)
        offsets = None if self.offsets is None else self.offsets[:, rows].T
        table = self.table
        if self.values == "e2m1":
            table = torch.tensor(E2M1, device=codes.device)
        if self.values == "e4m3":
            codes = codes.view(torch.float8_e4m3fn)
        weight = dequantize(codes, scales, zeros, offsets=offsets, table=table)
        if self.channel_scales is not None:
            weight *= self.channel_scales[rows, None]
        if self.order is None:
            return weight
        in_order = torch.empty_like(weight)
        in_order[:, self.order] = weight
        return in_order

    def _scales(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros, [num_rows, num_groups]."""
        kept = self.scales[:, rows].T.clone(memory_format=torch.contiguous_format)
        if self.scale_kind in ("float16", "bfloat16"):
            dtype = torch.float16 if self.scale_kind == "float16" else torch.bfloat16
            halves = kept.view(torch.int16).unflatten(-1, (-1, 2))
            zeros = halves[..., 1] if self.values == "integer" else None
            return halves[..., 0].contiguous().view(dtype), zeros
        if self.scale_kind != "float32":
            kept = kept.view(torch.float8_e4m3fn if self.scale_kind == "e4m3" else torch.float8_e8m0fnu)
        half = 2 ** (self.bits - 1)
        return kept, torch.full(kept.shape, half, device=kept.device) if self.values == "integer" else None


def make_matrix(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    order: Tensor | None = None,
    values: Values | Tensor = "integer",
    offsets: Tensor | None = None,
    channel_scales: Tensor | None = None,
) -> QuantizedMatrix:
    """A matrix of (code - zero) * scale + offset, times channel_scales of its rows: how every checkpoint gets here.

    codes: [num_outputs, num_inputs] integers in 0..2**bits - 1; those of several parts, one on top of the other
    scales: [num_outputs, num_groups] of consecutive columns of codes, as one of the dtypes of `Scales`
    zeros: [num_outputs, num_groups] integers in 0..2**bits, which must be so in those with 16-bit scales; None: all are
        2**(bits - 1). Codes of other `values` have none
    group_size: of `GROUP_SIZES`, or num_inputs for one group
    order: [num_inputs], the input that each column of codes is for, a permutation; None: in order (so act-order costs
        a gather of the activations: sort the columns by group, and say here which they were)
    values: what codes stand for: integers, the bits of floats (e2m1 of 4, e4m3 of 8), or a table of 16 floats
    offsets: [num_outputs, num_groups] float32, with scales in float32 and without zeros
    channel_scales: [num_outputs] float32 or a single number: what NVFP4's global scale comes to

    ValueError for what does not fit together, and for scales that are no finite numbers.
    """
    table = values if isinstance(values, Tensor) else None
    kind: Values = "table" if isinstance(values, Tensor) else values
    _check_shapes(codes, scales, zeros, offsets, bits=bits, group_size=group_size)
    num_outputs, num_inputs = codes.shape
    if kind != "integer" and (bits != (8 if kind == "e4m3" else 4) or zeros is not None):
        raise ValueError(f"codes of {bits} bits{' with zeros' if zeros is not None else ''} are no {kind}")
    if table is not None and table.shape != (16,):
        raise ValueError(f"a table of {tuple(table.shape)} values, but 4 bits have 16")
    _check_numbers(codes, scales, zeros, offsets, bits=bits)
    if kind == "e4m3" and bool(((codes & 0x7F) == 0x7F).any()):
        raise ValueError("some weights are no numbers")
    kept, offsets = _kept_scales(scales, zeros, offsets, half=2 ** (bits - 1))
    return QuantizedMatrix(
        words=pack_codes(codes, bits),
        scales=kept,
        bits=bits,
        num_inputs=num_inputs,
        group_size=0 if scales.shape[1] == 1 else group_size,
        scale_kind=_SCALES[scales.dtype],
        values=kind,
        offsets=offsets,
        channel_scales=_channel_scales(channel_scales, num_outputs, codes.device),
        order=_checked_order(order, num_inputs),
        table=None if table is None else table.to(codes.device, torch.float32).contiguous(),
    )


def _check_shapes(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None, *, bits: int, group_size: int
) -> None:
    if bits not in PLANES:
        raise ValueError(f"codes of {bits} bits; there are kernels for 1 to 8")
    if codes.dim() != 2 or 0 in codes.shape:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; a matrix [outputs, inputs] is wanted")
    num_outputs, num_inputs = codes.shape
    if group_size not in (*GROUP_SIZES, num_inputs):
        names = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"groups of {group_size} inputs; there are kernels for {names} and all inputs ({num_inputs})")
    if num_inputs % group_size:
        raise ValueError(f"a matrix of {num_inputs} inputs is not made of groups of {group_size}")
    for name, part in (("scales", scales), ("zeros", zeros), ("offsets", offsets)):
        if part is not None and part.shape != (num_outputs, num_inputs // group_size):
            expected = (num_outputs, num_inputs // group_size)
            raise ValueError(f"{name} have shape {tuple(part.shape)}, but {expected} groups have codes")
    if scales.dtype not in _SCALES:
        raise ValueError(f"scales are {scales.dtype}; there are kernels for {', '.join(_SCALES.values())}")
    if offsets is not None and (scales.dtype != torch.float32 or zeros is not None):
        raise ValueError(f"offsets come with scales in float32 and without zeros, not with {scales.dtype}")
    if zeros is not None and scales.dtype.itemsize == 1:
        raise ValueError(f"scales in {_SCALES[scales.dtype]} have no zeros beside them")


def _check_numbers(codes: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None, *, bits: int) -> None:
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= 2**bits:
        raise ValueError(f"codes of {bits} bits reach from {low} to {high}")
    for name, part in (("scales", scales), ("offsets", offsets)):
        if part is not None and not bool(part.float().isfinite().all()):
            raise ValueError(f"{name} are infinite or no numbers")
    if zeros is not None:
        bounds = float(zeros.min()), float(zeros.max())
        if not (bounds[0] >= 0 and bounds[1] <= 2**bits):
            raise ValueError(f"zeros of codes of {bits} bits reach from {bounds[0]:g} to {bounds[1]:g}")
        if zeros.is_floating_point() and scales.dtype != torch.float32 and bool((zeros != zeros.round()).any()):
            raise ValueError("zeros that are no integers come with scales in float32")


def _kept_scales(
    scales: Tensor, zeros: Tensor | None, offsets: Tensor | None, *, half: int
) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets as the kernels read them."""
    if scales.dtype.itemsize == 1:
        return scales.T.contiguous().view(torch.uint8), None
    if scales.dtype == torch.float32:
        if zeros is not None:
            offsets = (half - zeros.float()) * scales
        return scales.T.contiguous(), None if offsets is None else offsets.float().T.contiguous()
    upper = torch.full_like(scales, half, dtype=torch.int16) if zeros is None else zeros.to(torch.int16)
    paired = torch.stack((scales.view(torch.int16), upper), dim=-1)
    return paired.view(torch.int32).squeeze(-1).T.contiguous(), None


def _channel_scales(scales: Tensor | None, num_outputs: int, device: torch.device) -> Tensor | None:
    if scales is None:
        return None
    scales = scales.to(device, torch.float32).flatten()
    if len(scales) not in (1, num_outputs) or not bool(scales.isfinite().all()):
        raise ValueError(f"{len(scales)} scales for {num_outputs} rows, or some that are no finite numbers")
    return scales.expand(num_outputs).contiguous()


def _checked_order(order: Tensor | None, num_inputs: int) -> Tensor | None:
    if order is None:
        return None
    order = order.long()
    if order.shape != (num_inputs,) or not bool(
        (order.sort().values == torch.arange(num_inputs, device=order.device)).all()
    ):
        raise ValueError(f"the order of inputs is no permutation of {num_inputs}")
    in_order = bool((order == torch.arange(num_inputs, device=order.device)).all())
    return None if in_order else order.contiguous()
