"""How a quantised matrix lies in a GPU's memory: codes of 1 to 8 bits, in planes of words, as tensor cores want them.

A tensor core's first operand lies in the registers of a warp so that lane `4 * row + c` has, of each 8 inputs, numbers
2c and 2c + 1 of its row. Codes are packed in that order: a word has codes of one row for one value of c, and each pair
of neighbours at the same bits of its two halves, so that one mask unpacks both and nothing is exchanged between lanes.

    a code of 7 bits     6 5 4 3 | 2 1 | 0        in planes of 4, 2 and 1 bits (`PLANES`), the lowest bits first
                                                  in the plane that is first
    a plane of `width`   a *block* is 128 / width inputs of all rows: [num_outputs, 4] words, c last;
                         word c, bits width * m + 16 * h: that part of the code of input 8m + 2c + h of the block
    a matrix             a *unit* is the inputs that all planes have whole blocks of:
                         [num_units, blocks of a unit, num_outputs, 4] words, a unit's planes one after the other

So a step of a product reads, for each plane, rows that lie one after the other, and `bits` bits a code, none wasted,
but for the last unit's where it is not full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_LANES = 4  # words of a row in a block
_BLOCK_BITS = 128  # of a row in a block
_PIECE = 1 << 22  # codes that are packed at a time


@dataclass(frozen=True, slots=True)
class Plane:
    """width: bits of a code; low: the lowest of them; first, num_blocks: its blocks in a unit"""

    width: int
    low: int
    first: int
    num_blocks: int


def unit_of(bits: int) -> int:
    """Inputs of a unit."""
    return _BLOCK_BITS // min(PLANES[bits])


def planes_of(bits: int) -> Iterator[Plane]:
    low = first = 0
    for width in PLANES[bits]:
        num_blocks = width // min(PLANES[bits])
        yield Plane(width, low, first, num_blocks)
        low, first = low + width, first + num_blocks


def words_shape(num_outputs: int, num_inputs: int, bits: int) -> tuple[int, int, int, int]:
    """[num_units, blocks of a unit, num_outputs, 4]"""
    return -(-num_inputs // unit_of(bits)), bits // min(PLANES[bits]), num_outputs, _LANES


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Words of `words_shape`, int32, on the codes' device. codes: [num_outputs, num_inputs], integers below 2**bits."""
    num_outputs, num_inputs = codes.shape
    words = torch.empty(words_shape(num_outputs, num_inputs, bits), dtype=torch.int32, device=codes.device)
    step = max(1, _PIECE // max(1, num_inputs))
    for start in range(0, num_outputs, step):
        rows = slice(start, start + step)
        padded = F.pad(codes[rows].to(torch.int32), (0, -num_inputs % unit_of(bits)))
        for plane in planes_of(bits):
            part = _in_blocks((padded >> plane.low) & ((1 << plane.width) - 1), plane)
            packed = (part << _shifts(plane, codes.device)).sum((3, 5), dtype=torch.int32)
            words[:, plane.first : plane.first + plane.num_blocks, rows] = packed.permute(1, 2, 0, 3)
    return words


def unpack_codes(words: Tensor, num_inputs: int, bits: int, rows: slice = slice(None)) -> Tensor:
    """The codes of some rows, [num_rows, num_inputs] uint8."""
    words = words[:, :, rows]
    num_units, _, num_rows, _ = words.shape
    codes = torch.zeros(num_rows, num_units * unit_of(bits), dtype=torch.uint8, device=words.device)
    for plane in planes_of(bits):
        part = words[:, plane.first : plane.first + plane.num_blocks].permute(2, 0, 1, 3)[:, :, :, None, :, None]
        part = (part >> _shifts(plane, words.device)) & ((1 << plane.width) - 1)
        codes |= (part << plane.low).to(torch.uint8).reshape(codes.shape)
    return codes[:, :num_inputs].contiguous()


def _in_blocks(codes: Tensor, plane: Plane) -> Tensor:
    """[num_rows, num_units, num_blocks, pairs of a lane, 4 lanes, 2]"""
    return codes.reshape(len(codes), -1, plane.num_blocks, 16 // plane.width, _LANES, 2)


def _shifts(plane: Plane, device: torch.device) -> Tensor:
    """[pairs of a lane, 1, 2]"""
    pairs = torch.arange(0, 16, plane.width, dtype=torch.int32, device=device)
    return pairs[:, None, None] + torch.tensor([0, 16], dtype=torch.int32, device=device)
