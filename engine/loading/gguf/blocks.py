"""From GGUF's blocks to integers and scales, without a float in between.

Where the bits of a block lie is written down in ggml (ggml-common.h, ggml-quants.c); they stand for the gguf package's
numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import gguf
import torch
from gguf.constants import GGMLQuantizationType as Format
from torch import Tensor

from engine.loading.gguf.dequantize import dequantize
from engine.quantization.stored_levels import StoredLevels
from kernels.numba.core import formats
from kernels.numba.core.formats import GROUP, Levels


class Parts(NamedTuple):
    """Of some blocks: levels [blocks, elements]; factors [blocks, groups, factors] and commons as of `Levels`."""

    levels: Tensor
    factors: Tensor
    commons: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Blocks(StoredLevels):
    """A matrix in blocks. raw: uint8 [num_rows, bytes of a row]; format: one of `KINDS`; name: for people"""

    raw: Tensor
    format: Format
    name: str

    @classmethod
    def of(cls, raw: Tensor, format: Format, shape: tuple[int, int], name: str) -> Blocks:
        return cls(shape, KINDS[format], raw.view(shape[0], -1), format, name)

    def levels(self, start: int, stop: int) -> Levels:
        depth, num_rows = self.shape[1], stop - start
        blocks = self.raw[start:stop].reshape(-1, gguf.GGML_QUANT_SIZES[self.format][1])
        levels, factors, commons = _READERS[self.format](blocks)
        if not bool((factors if commons is None else commons).isfinite().all()):
            raise ValueError(f"{self.name} has scales that are no numbers; the file is damaged: download it again")
        factors = factors.reshape(num_rows, depth // GROUP, -1)
        commons = None if commons is None else commons.reshape(num_rows, -1, commons.shape[-1])
        return Levels(KINDS[self.format], levels.reshape(num_rows, depth), factors, commons)

    def dense(self, start: int, stop: int) -> Tensor:
        return dequantize(self.raw[start:stop].reshape(-1), self.format, (stop - start, self.shape[1])).float()


def _rows(part: Tensor, size: int) -> Tensor:
    """[blocks, n] -> [blocks, n / size, size]"""
    return part.reshape(len(part), -1, size)


def _nibbles(packed: Tensor) -> Tensor:
    """The lower four bits of all bytes, then the upper ones, [..., n] -> [..., 2 * n]."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _fields(packed: Tensor, bits: int) -> Tensor:
    """Fields of so many bits: the lowest of all bytes, then the next, [..., n] -> [..., 8 / bits * n]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).unsqueeze(-1)
    return ((packed.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _halves(blocks: Tensor, first: int, count: int = 1) -> Tensor:
    """float16 numbers from a byte on, [blocks, count]"""
    return blocks[:, first : first + 2 * count].contiguous().view(torch.float16)


def _one_level(levels: Tensor, factors: Tensor) -> Parts:
    return Parts(levels, factors.unsqueeze(1))


def _q4_0(blocks: Tensor) -> Parts:
    """d, 32 nibbles q: d (q - 8)"""
    return _one_level(_nibbles(blocks[:, 2:]), _halves(blocks, 0))


def _q4_1(blocks: Tensor) -> Parts:
    """d, m, 32 nibbles q: d q + m"""
    return _one_level(_nibbles(blocks[:, 4:]), _halves(blocks, 0, 2))


def _fifth_bits(packed: Tensor) -> Tensor:
    """Of 32 elements, in 4 bytes: at their place in a level."""
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(-2) << 4


def _q5_0(blocks: Tensor) -> Parts:
    """d, 32 upper bits, 32 nibbles: d (q - 16)"""
    return _one_level(_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]), _halves(blocks, 0))


def _q5_1(blocks: Tensor) -> Parts:
    """d, m, 32 upper bits, 32 nibbles: d q + m"""
    return _one_level(_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]), _halves(blocks, 0, 2))


def _q8_0(blocks: Tensor) -> Parts:
    """d, 32 signed bytes q: d q"""
    return _one_level(blocks[:, 2:].view(torch.int8), _halves(blocks, 0))


def _mxfp4(blocks: Tensor) -> Parts:
    """An exponent e, 32 nibbles: twice the table's values, times 2^(e - 128)"""
    exponents = blocks[:, :1].to(torch.int16)
    bits = torch.where(exponents < 2, 0x20 << exponents.clamp(max=1), (exponents - 1) << 7)
    return _one_level(_nibbles(blocks[:, 1:]), bits.to(torch.int16).view(torch.bfloat16))


def _q2_k(blocks: Tensor) -> Parts:
    """16 bytes of a scale and a minimum, 64 of fields, d, dmin: d s q - dmin m"""
    factors = torch.stack((blocks[:, :16] & 15, blocks[:, :16] >> 4), 1)  # [blocks, 2, 16]
    factors = factors.reshape(-1, 2, 8, 2).transpose(1, 2).flatten(2)
    levels = _fields(_rows(blocks[:, 16:80], 32), 2).flatten(1)
    return Parts(levels, factors.to(torch.int8), _with_minima(_halves(blocks, 80, 2)))


def _q3_k(blocks: Tensor) -> Parts:
    """32 bytes of upper bits, 64 of fields, 12 of scales in six bits each, d: d (s - 32) (q - 4)"""
    lower = _fields(_rows(blocks[:, 32:96], 32), 2).flatten(1)
    levels = lower | (_fields(blocks[:, :32], 1) << 2)
    scales = _nibbles(blocks[:, 96:104]) | (_fields(blocks[:, 104:108], 2) << 4)
    return Parts(levels, (scales.to(torch.int8) - 32).view(-1, 8, 2), _halves(blocks, 108).unsqueeze(1))


def _q4_k(blocks: Tensor) -> Parts:
    """d, dmin, 12 bytes of eight scales and minima in six bits each, 128 of nibbles: d s q - dmin m"""
    levels = _nibbles(_rows(blocks[:, 16:], 32)).flatten(1)
    return Parts(levels, _scales_and_minima(blocks[:, 4:16]), _with_minima(_halves(blocks, 0, 2)))


def _q5_k(blocks: Tensor) -> Parts:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles, those of 32 elements in a bit of each."""
    lower = _nibbles(_rows(blocks[:, 48:], 32)).flatten(1)
    levels = lower | (_fields(blocks[:, 16:48], 1) << 4)
    return Parts(levels, _scales_and_minima(blocks[:, 4:16]), _with_minima(_halves(blocks, 0, 2)))


def _q6_k(blocks: Tensor) -> Parts:
    """128 bytes of nibbles, 64 of fields, 16 signed scales, d: d s (q - 32)"""
    lower = _nibbles(_rows(blocks[:, :128], 64)).flatten(1)
    levels = lower | (_fields(_rows(blocks[:, 128:192], 32), 2).flatten(1) << 4)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).view(-1, 8, 2)
    return Parts(levels, scales, _halves(blocks, 208).unsqueeze(1))


def _iq4_nl(blocks: Tensor) -> Parts:
    """d, 32 nibbles: d times the table's values"""
    return _one_level(_nibbles(blocks[:, 2:]), _halves(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Parts:
    """d, 2 bytes of the upper bits of eight scales, 4 of their nibbles, 128 of nibbles: d (s - 32) times the table's"""
    levels = _nibbles(_rows(blocks[:, 8:], 16)).flatten(1)
    upper = ((blocks[:, 2:4].unsqueeze(-1) >> torch.arange(0, 8, 2, dtype=torch.uint8)) & 3).flatten(1)
    lower = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), -1).flatten(1)
    scales = (lower | (upper << 4)).to(torch.int8) - 32
    return Parts(levels, scales.unsqueeze(-1), _halves(blocks, 0).unsqueeze(1))


def _scales_and_minima(packed: Tensor) -> Tensor:
    """[blocks, 12] -> [blocks, 8, 2] int8: of the first four groups in six bits of a byte, of the last four in a nibble
    and in what the first ones leave of theirs."""
    scales, minima, nibbles = _rows(packed, 4).unbind(1)
    scales = torch.cat((scales & 63, (nibbles & 15) | ((scales >> 2) & 48)), 1)
    minima = torch.cat((minima & 63, (nibbles >> 4) | ((minima >> 2) & 48)), 1)
    return torch.stack((scales, minima), -1).to(torch.int8)


def _with_minima(commons: Tensor) -> Tensor:
    """[blocks, 2] -> [blocks, 1, 2]: minima are taken away, offsets are added."""
    return torch.stack((commons[:, 0], -commons[:, 1]), -1).unsqueeze(1)


_READERS: dict[Format, Callable[[Tensor], Parts]] = {
    Format.Q4_0: _q4_0,
    Format.Q4_1: _q4_1,
    Format.Q5_0: _q5_0,
    Format.Q5_1: _q5_1,
    Format.Q8_0: _q8_0,
    Format.Q2_K: _q2_k,
    Format.Q3_K: _q3_k,
    Format.Q4_K: _q4_k,
    Format.Q5_K: _q5_k,
    Format.Q6_K: _q6_k,
    Format.IQ4_NL: _iq4_nl,
    Format.IQ4_XS: _iq4_xs,
    Format.MXFP4: _mxfp4,
}
_NAMED_OTHERWISE = {"Q4_1": "INT4", "Q8_0": "INT8"}  # formats that other checkpoints have too
KINDS: dict[Format, int] = {
    format: getattr(formats, _NAMED_OTHERWISE.get(format.name, format.name)) for format in _READERS
}
