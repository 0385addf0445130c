"""From GGUF's blocks to floats.

The three formats of most files are computed here, three times as fast as the gguf package's numpy and with the same
bits; every other format goes through the package, whose functions are the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gguf
import torch
from gguf.constants import GGMLQuantizationType as Format
from torch import Tensor

from engine.quantization.threads import Threads

ONE_THREAD = Threads(1)
_PIECE = 1 << 19  # elements computed at once: what lies between two operations stays in the CPU's cache
_PLAIN = {
    Format.F32: torch.float32,
    Format.F16: torch.float16,
    Format.BF16: torch.bfloat16,
    Format.F64: torch.float64,
}


def dequantize(raw: Tensor, format: Format, shape: tuple[int, ...], threads: Threads = ONE_THREAD) -> Tensor:
    """The tensor that the bytes `raw` ([num_bytes] uint8) stand for: float32, or as stored where they are plain floats,
    which are `raw` itself.

    Raises ValueError for a format that holds no weights.
    """
    if format in _PLAIN:
        return raw.view(_PLAIN[format]).view(shape)
    num_elements, num_bytes = gguf.GGML_QUANT_SIZES[format]
    blocks = raw.view(-1, num_bytes)
    values = torch.empty(len(blocks), num_elements)
    compute = _FAST.get(format, partial(_by_package, format))
    step = threads.step(len(blocks), max(1, _PIECE // num_elements))

    def fill(start: int) -> None:
        compute(blocks[start : start + step], values[start : start + step])

    threads.map(fill, range(0, len(blocks), step))
    return values.view(shape)


def _by_package(format: Format, blocks: Tensor, out: Tensor) -> None:
    try:
        out.copy_(torch.from_numpy(gguf.dequantize(blocks.numpy(), format)))
    except NotImplementedError:
        raise ValueError(f"weights of type {format.name} cannot be read; use a file of another quantisation") from None


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


_FAST: dict[Format, Callable[[Tensor, Tensor], None]] = {  # (blocks, out) -> None
    Format.Q4_0: _q4_0,
    Format.Q4_1: _q4_1,
    Format.Q8_0: _q8_0,
}
