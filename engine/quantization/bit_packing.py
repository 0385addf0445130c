"""Integers of 2 to 8 bits out of the 32-bit words of a checkpoint, and into them, lowest bits first, along the last
dimension."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = range(1, 9)


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """`count` integers from words without a gap: 32 of them in `bits` words, of which some lie across two words.

    words: int32 [..., >= count * bits / 32] -> uint8 [..., count]
    """
    assert bits in _BITS, f"{bits} bits"
    if bits in (1, 2, 4, 8):
        octets = words.contiguous().view(torch.uint8)  # the lowest first
        if bits == 8:
            return octets[..., :count]
        parts = [(octets >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, -1).flatten(-2)[..., :count]
    missing = -words.shape[-1] % bits
    if missing:
        words = torch.nn.functional.pad(words, (0, missing))
    blocks = words.reshape(*words.shape[:-1], -1, bits).long() & 0xFFFFFFFF  # [..., blocks, bits]
    out = torch.empty(*blocks.shape[:-1], 32, dtype=torch.uint8, device=words.device)
    for place in range(32):
        word, first = divmod(place * bits, 32)
        value = blocks[..., word] >> first
        if first + bits > 32:
            value = value | (blocks[..., word + 1] << (32 - first))
        out[..., place] = value & ((1 << bits) - 1)
    return out.flatten(-2)[..., :count]


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Words without a gap, of which `unpack_bits` makes the integers again; the last one ends in zeros.

    values: uint8 [..., count], below 2^bits -> int32 [..., num_words(count, bits)]
    """
    assert bits in _BITS, f"{bits} bits"
    count = values.shape[-1]
    missing = -count % 32
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    if bits in (1, 2, 4, 8):
        parts = values.reshape(*values.shape[:-1], -1, 8 // bits)
        octets = parts[..., 0].clone()
        for place in range(1, 8 // bits):
            octets |= parts[..., place] << (bits * place)
        words = octets.contiguous().view(torch.int32)
    else:
        blocks = values.reshape(*values.shape[:-1], -1, 32).long()  # [..., blocks, 32]
        wide = torch.zeros(*blocks.shape[:-1], bits, dtype=torch.int64, device=values.device)
        for place in range(32):
            word, first = divmod(place * bits, 32)
            wide[..., word] |= blocks[..., place] << first & 0xFFFFFFFF
            if first + bits > 32:
                wide[..., word + 1] |= blocks[..., place] >> (32 - first)
        words = wide.flatten(-2).to(torch.int32)  # the upper half is zero, and the lower keeps its bits
    found: Tensor = words[..., : num_words(count, bits)].contiguous()
    return found


def unpack_padded_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """As `unpack_bits`, from words that hold as many whole integers as they can, and zeros above them."""
    assert bits in _BITS, f"{bits} bits"
    parts = [(words >> (bits * place)) & ((1 << bits) - 1) for place in range(32 // bits)]
    return torch.stack(parts, -1).flatten(-2)[..., :count].to(torch.uint8)


def num_words(count: int, bits: int) -> int:
    """Words that `count` integers take without a gap."""
    return -(-count * bits // 32)


def num_padded_words(count: int, bits: int) -> int:
    return -(-count // (32 // bits))
