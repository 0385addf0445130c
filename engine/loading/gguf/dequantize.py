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
_CHUNK = 1 << 14  # blocks computed at once: what lies between two operations stays in the CPU's cache
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
        return _in_chunks(*_FAST[format], raw).view(shape)
    try:
        values = gguf.dequantize(raw.numpy().reshape(*shape[:-1], -1), format)
    except NotImplementedError:
        raise ValueError(f"weights of type {format.name} cannot be read; use a file of another quantisation") from None
    return torch.from_numpy(values).view(shape)


def _in_chunks(compute: Callable[[Tensor, Tensor], None], block_bytes: int, raw: Tensor) -> Tensor:
    blocks = raw.view(-1, block_bytes)
    values = torch.empty(len(blocks), _BLOCK)
    for start in range(0, len(blocks), _CHUNK):
        compute(blocks[start : start + _CHUNK], values[start : start + _CHUNK])
    return values


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    """Blocks of a half scale d and 32 nibbles q: (q - 8) * d. Low nibbles come first."""
    out.copy_(_nibbles(blocks[:, 2:])).sub_(8).mul_(_halves(blocks, 1))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    """Blocks of a half scale d, a half minimum m and 32 nibbles q: q * d + m. Low nibbles come first."""
    halves = _halves(blocks, 2)
    out.copy_(_nibbles(blocks[:, 4:])).mul_(halves[:, :1]).add_(halves[:, 1:])


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    """Blocks of a half scale d and 32 signed bytes q: q * d."""
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_halves(blocks, 1))


def _nibbles(packed: Tensor) -> Tensor:
    """[num_blocks, 16] bytes -> [num_blocks, 32] numbers below 16"""
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _halves(blocks: Tensor, count: int) -> Tensor:
    """The float16 numbers at the head of each block, as float32. [num_blocks, count]"""
    return blocks[:, : 2 * count].contiguous().view(torch.float16).float()


_FAST: dict[Format, tuple[Callable[[Tensor, Tensor], None], int]] = {  # (blocks, out) -> None, bytes of a block
    Format.Q4_0: (_q4_0, 2 + _BLOCK // 2),
    Format.Q4_1: (_q4_1, 4 + _BLOCK // 2),
    Format.Q8_0: (_q8_0, 2 + _BLOCK),
}
