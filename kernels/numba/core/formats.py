"""Element formats of weights, tables and KV caches, as the integers that stand for them in operations.

A format of integers is one entry of `INTEGERS`: its tiles, its packing and its sizes all follow from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kernels.layout import PANEL

GROUP = 32  # elements along the depth that share the scale of an integer format, as in GGUF's blocks
SUPER_GROUP = 256  # elements that share what scales of two levels are multiples of

FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 = range(5)  # of packed matrices; tables have the first three, KV caches INT8 too
ROUNDED_BFLOAT16 = 5  # of products: BFLOAT16, whose other factor is rounded to bfloat16 too
Q4_0, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4 = range(8, 19)  # of GGUF files
INT4_ZEROS, NVFP4, INT8_ZEROS, NF4, FP4, FLOAT8, INT6 = range(19, 26)  # of other checkpoints
QUADS = 32  # added to a format of integers: in the layout that rows of 8-bit integers are multiplied by
QUAD_INT8, QUAD_INT4 = QUADS + INT8, QUADS + INT4
DTYPES = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}
FORMAT_OF = {dtype: kind for kind, dtype in DTYPES.items()}

_NORMAL_FLOATS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's for IQ4
_TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # of OCP's microscaling formats, version 1.0
NF4_BOOK = (  # quantiles of a normal distribution (Dettmers et al., 2023, "QLoRA", appendix E)
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
NF4_STEPS = 3393.57  # of which the book's numbers are whole multiples within 2.9e-4 of each, in 12 bits and a sign
_NF4_MULTIPLES = tuple(round(number * NF4_STEPS) for number in NF4_BOOK)
_TIMES_192 = (0, 1, 128, 192, 64, 96, 32, 48)
FP4_STEPS = 192
FP4_BOOK = tuple(sign * number / FP4_STEPS for sign in (1, -1) for number in _TIMES_192)  # bitsandbytes'
_FP4_MULTIPLES = tuple(sign * number for sign in (1, -1) for number in _TIMES_192)
_LARGEST_OF_ROWS, _LARGEST_SUM = 2**15 - 1, 2**31 - 1  # of activations in 16 bits; of sums in 32


@dataclass(frozen=True, slots=True)
class IntegerFormat:
    """Weights that are small integers, *levels*, times scales that groups of them share.

    A weight is scale * (level - zero), or scale * table[level], or scale * level + offset. A table's numbers may have
    up to 16 bits; the more, the fewer products make an exact sum. Scales and offsets of "two levels" are small integers
    (int8) times a float16 of each 256 weights; float32 products of them are exact. With `has_zeros`, what stands where
    an offset would is a whole number, the group's own zero: the offset is -zero * scale.

    Levels of fewer than 8 bits lie in planes, the lower bits first: of a group, 16 words of 32 bits after 16 words, one
    for each column of a panel. A word has the levels of two depths side by side, in 16 bits each, those of the next two
    shifted by a plane's bits, and so on; in quads, of four depths, in 8 bits each. Levels of 8 or 16 bits are bytes or
    words, two or four depths side by side.
    """

    name: str
    bits: int
    per_scale: int = GROUP
    scales: Literal["float16", "bfloat16", "float32", "two levels"] = "float16"
    has_offsets: bool = False
    has_zeros: bool = False
    zero: int = 0
    table: tuple[int, ...] = ()
    depths: int = 2  # side by side: 2, or 4 in quads
    is_unpacked: bool = False  # as they are multiplied, in memory of a thread
    largest_unpacked: int = 0

    @property
    def is_two_level(self) -> bool:
        return self.scales == "two levels"

    @property
    def num_scales(self) -> int:
        """Scales of a group of 32, and as many offsets if there are any."""
        return GROUP // self.per_scale

    @property
    def per_sum(self) -> int:
        """Elements whose products are added up exactly, in 32 bits, of those that share a scale."""
        most = _LARGEST_SUM // (_LARGEST_OF_ROWS * self.largest)
        return min(self.per_scale, 1 << (most.bit_length() - 1))

    @property
    def num_sums(self) -> int:
        """Exact sums of a group of 32."""
        return GROUP // self.per_sum

    @property
    def num_steps(self) -> int:
        """Twos or fours of depths of an exact sum."""
        return self.per_sum // self.depths

    @property
    def num_factors(self) -> int:
        """Scales and offsets of a group of 32."""
        return self.num_scales * (1 + self.has_offsets)

    @property
    def group_bytes(self) -> int:
        """Of the levels of 32 depths of a panel."""
        return GROUP * PANEL * self.bits // 8

    @property
    def factor_width(self) -> int:
        """Bytes of a scale or an offset of one level."""
        return 4 if self.scales == "float32" else 2

    @property
    def scale_bytes(self) -> int:
        """Of the scales and offsets of 32 depths of a panel; of 256, an eighth of theirs."""
        if not self.is_two_level:
            return self.factor_width * PANEL * self.num_factors
        return PANEL * self.num_factors + 2 * PANEL * (1 + self.has_offsets) * GROUP // SUPER_GROUP

    @property
    def depth_multiple(self) -> int:
        return SUPER_GROUP if self.is_two_level else GROUP

    @property
    def unpacked(self) -> IntegerFormat:
        """The same weights as they are multiplied: 16 bits each, or 8 in quads."""
        wide, largest = 32 // self.depths, self.largest
        return replace(
            self, name=f"unpacked {self.name}", bits=wide, table=(), is_unpacked=True, largest_unpacked=largest
        )

    @property
    def is_signed(self) -> bool:
        """Whether what is multiplied may be negative."""
        return self.bits == 8 or bool(self.table)

    @property
    def planes(self) -> tuple[tuple[int, int], ...]:
        """(bits, place of the lowest one in the level) of each."""
        planes = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}[self.bits]
        return tuple((bits, sum(planes[:index])) for index, bits in enumerate(planes))

    @property
    def has_wide_table(self) -> bool:
        """Whether its numbers take 16 bits."""
        return any(abs(number) > 127 for number in self.table)

    @property
    def largest(self) -> int:
        """The largest size of what is multiplied."""
        if self.is_unpacked:
            return self.largest_unpacked
        return max(map(abs, self.table)) if self.table else 2**self.bits - 1 if self.bits < 8 else 128

    @property
    def num_bytes(self) -> float:
        """Of a weight, scales included."""
        return (self.group_bytes + self.scale_bytes) / (GROUP * PANEL)


_OF_PAIRS = {
    INT8: IntegerFormat("int8", 8),
    INT4: IntegerFormat("int4", 4, has_offsets=True),
    Q4_0: IntegerFormat("Q4_0", 4, zero=8),
    Q5_0: IntegerFormat("Q5_0", 5, zero=16),
    Q5_1: IntegerFormat("Q5_1", 5, has_offsets=True),
    Q2_K: IntegerFormat("Q2_K", 2, per_scale=16, scales="two levels", has_offsets=True),
    Q3_K: IntegerFormat("Q3_K", 3, per_scale=16, scales="two levels", zero=4),
    Q4_K: IntegerFormat("Q4_K", 4, scales="two levels", has_offsets=True),
    Q5_K: IntegerFormat("Q5_K", 5, scales="two levels", has_offsets=True),
    Q6_K: IntegerFormat("Q6_K", 6, per_scale=16, scales="two levels", zero=32),
    IQ4_NL: IntegerFormat("IQ4_NL", 4, table=_NORMAL_FLOATS),
    IQ4_XS: IntegerFormat("IQ4_XS", 4, scales="two levels", table=_NORMAL_FLOATS),
    MXFP4: IntegerFormat("MXFP4", 4, scales="bfloat16", table=_TWICE_E2M1),
    INT4_ZEROS: IntegerFormat("int4 with zero points", 4, has_offsets=True, has_zeros=True),
    INT6: IntegerFormat("int6", 6, zero=32),
    NVFP4: IntegerFormat("NVFP4", 4, per_scale=16, scales="float32", table=_TWICE_E2M1),
    INT8_ZEROS: IntegerFormat("int8 with zero points", 8, has_offsets=True, has_zeros=True),
    NF4: IntegerFormat("nf4", 4, scales="float32", table=_NF4_MULTIPLES),
    FP4: IntegerFormat("fp4", 4, scales="float32", table=_FP4_MULTIPLES),
}
_OF_QUADS = {  # whose levels have 8 bits
    QUADS + kind: replace(one, name=f"{one.name}, by activations of 8 bits", depths=4)
    for kind, one in _OF_PAIRS.items()
    if not one.has_wide_table
}
INTEGERS: dict[int, IntegerFormat] = _OF_PAIRS | _OF_QUADS
IN_QUADS = {kind - QUADS: kind for kind in _OF_QUADS}

# FLOAT8: e4m3 numbers of 8 bits, times a float32 scale of each 32 along the depth; rows stay float32
FLOAT8_SCALE_BYTES = 4 * PANEL  # of 32 depths of a panel
NAMES = {FLOAT32: "float32", BFLOAT16: "bfloat16", FLOAT16: "float16", FLOAT8: "FP8"} | {
    kind: one.name for kind, one in INTEGERS.items()
}
SIZES = {FLOAT32: 4.0, BFLOAT16: 2.0, FLOAT16: 2.0, FLOAT8: 1.125} | {
    kind: one.num_bytes for kind, one in INTEGERS.items()
}


@dataclass(frozen=True, slots=True)
class Levels:
    """Rows of a matrix as integers and scales, in no layout yet.

    levels: [num_rows, depth], uint8, or int8 where they have 8 bits; of FLOAT8 its numbers' bits, uint8
    factors: of each group of 32 its scales, then its offsets, [num_rows, depth / 32, factors]: the format's floats, or
    int8 with scales of two levels, and then `commons`, by which they are multiplied: float16 [num_rows, depth / 256, 1
    or 2], that of the scales and that of the offsets
    """

    kind: int  # in pairs
    levels: Tensor
    factors: Tensor
    commons: Tensor | None = None


def concatenate(pieces: Sequence[Levels]) -> Levels:
    """Rows of one format, from top to bottom."""
    if len(pieces) == 1:
        return pieces[0]
    commons = [piece.commons for piece in pieces if piece.commons is not None]
    return Levels(
        pieces[0].kind,
        torch.cat([piece.levels for piece in pieces]),
        torch.cat([piece.factors for piece in pieces]),
        torch.cat(commons) if commons else None,
    )
