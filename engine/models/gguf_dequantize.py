"""From GGUF's blocks to floats.

The three formats of most files are computed here, three times as fast as the gguf package's numpy and with the same
bits; every other format goes through the package, whose functions are the definition.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import torch
from gguf.constants import GGMLQuantizationType as Format
from torch import Tensor

_BLOCK = 32  # elements per block of Q4_0, Q4_1 and Q8_0
_PLAIN = {
    Format.F32: torch.float32,
    Format.F16: torch.float16,
    Format.BF16: torch.bfloat16,
    Format.F64: torch.float64,
}


def dequantize(raw: Tensor, format: Format, shape: tuple[int, ...]) -> Tensor:
    """The tensor that the bytes `raw` ([num_bytes] uint8) stand for: float32, or as stored where they are plain floats.

    Raises ValueError for a format that holds no weights.
    """
    if format in _PLAIN:
        return raw.view(_PLAIN[format]).view(shape)
    if format in _FAST:
        return _FAST[format](raw).view(shape)
    try:
        values = gguf.dequantize(raw.numpy().reshape(*shape[:-1], -1), format)
    except NotImplementedError:
        raise ValueError(f"weights of type {format.name} cannot be read; use a file of another quantisation") from None
    return torch.from_numpy(values).view(shape)


def _q4_0(raw: Tensor) -> Tensor:
    """Blocks of a half scale d and 32 nibbles q: (q - 8) * d. Low nibbles come first."""
    blocks = raw.view(-1, 2 + _BLOCK // 2)
    scale = _halves(blocks, 1)
    packed = blocks[:, 2:]
    values = scale.new_empty(len(blocks), 2, _BLOCK // 2)
    torch.mul((packed & 15).to(torch.int8) - 8, scale, out=values[:, 0])
    torch.mul((packed >> 4).to(torch.int8) - 8, scale, out=values[:, 1])
    return values


def _q4_1(raw: Tensor) -> Tensor:
    """Blocks of a half scale d, a half minimum m and 32 nibbles q: q * d + m. Low nibbles come first."""
    blocks = raw.view(-1, 4 + _BLOCK // 2)
    halves = _halves(blocks, 2)
    scale, minimum = halves[:, :1], halves[:, 1:, None]
    packed = blocks[:, 4:]
    values = scale.new_empty(len(blocks), 2, _BLOCK // 2)
    torch.mul(packed & 15, scale, out=values[:, 0])
    torch.mul(packed >> 4, scale, out=values[:, 1])
    return values.add_(minimum)


def _q8_0(raw: Tensor) -> Tensor:
    """Blocks of a half scale d and 32 signed bytes q: q * d."""
    blocks = raw.view(-1, 2 + _BLOCK)
    return blocks[:, 2:].view(torch.int8) * _halves(blocks, 1)


def _halves(blocks: Tensor, count: int) -> Tensor:
    """The float16 numbers at the head of each block, as float32. [num_blocks, count]"""
    return blocks[:, : 2 * count].contiguous().view(torch.float16).float()


_FAST: dict[Format, Callable[[Tensor], Tensor]] = {Format.Q4_0: _q4_0, Format.Q4_1: _q4_1, Format.Q8_0: _q8_0}
