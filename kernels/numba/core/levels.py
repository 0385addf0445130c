"""The integers and the scales of packed weights, read into vectors as tiles multiply them (`formats.IntegerFormat`)."""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from kernels.numba.core.formats import GROUP, SUPER_GROUP, IntegerFormat
from kernels.numba.core.lanes import FLOATS, I8, I16, I32, I64, INTS, LANES, call_by_name, load, load_floats, splat
from kernels.numba.core.processor import features

WORDS = ir.VectorType(I16, 2 * LANES)
BYTES = ir.VectorType(I8, 4 * LANES)


def load_levels(builder: ir.IRBuilder, base: ir.Value, weights: IntegerFormat, step: int | ir.Value) -> ir.Value:
    """What is multiplied of two depths in 16 columns, [32] int16, or of four in quads, [64] bytes as [16] int32:
    columns in order, the depths of each side by side.

    base: the address of a group; step: which two or four of its depths. Bytes may be asked for by a value.
    """
    if weights.bits >= 8:
        index = I64(step) if isinstance(step, int) else step
        address = builder.add(base, builder.mul(index, I64(weights.depths * LANES * weights.bits // 8)))
        if weights.bits == 16:
            return load(builder, address, WORDS, 2)
        if weights.depths == 4:
            return load(builder, address, INTS, 1)
        return builder.sext(load(builder, address, ir.VectorType(I8, 2 * LANES), 1), WORDS)
    assert isinstance(step, int), "levels in planes are written out"
    if weights.has_wide_table:
        return _look_up_wide(builder, _load_plane(builder, base, weights, step, bits=4, place=0), weights.table)
    if weights.table:
        return _look_up(builder, _load_plane(builder, base, weights, step, bits=4, place=_place(weights)), weights)
    parts, skipped = [], 0
    for bits, place in weights.planes:
        parts.append(_load_plane(builder, builder.add(base, I64(skipped)), weights, step, bits=bits, place=place))
        skipped += GROUP * LANES * bits // 8
    levels = parts[0] if len(parts) == 1 else builder.or_(*parts)
    return levels if weights.depths == 4 else builder.bitcast(levels, WORDS)


def _load_plane(
    builder: ir.IRBuilder, base: ir.Value, weights: IntegerFormat, step: int, *, bits: int, place: int
) -> ir.Value:
    """Bits of levels, at their place in 8 or 16 bits: [16] int32."""
    lane_bits = 32 // weights.depths
    word, within = divmod(step, lane_bits // bits)
    words = load(builder, builder.add(base, I64(4 * LANES * word)), INTS, 1)
    shift = bits * within - place
    if shift:
        by = ir.Constant(INTS, [abs(shift)] * LANES)
        words = builder.lshr(words, by) if shift > 0 else builder.shl(words, by)
    mask = sum(((1 << bits) - 1) << (place + lane_bits * lane) for lane in range(weights.depths))
    return builder.and_(words, ir.Constant(INTS, [mask] * LANES))


def _place(weights: IntegerFormat) -> int:
    """Of a level that is looked up: in 16 bits, the upper byte, so that what is found there is shifted down with its
    sign."""
    return 0 if weights.depths == 4 else 8


def _look_up(builder: ir.IRBuilder, levels: ir.Value, weights: IntegerFormat) -> ir.Value:
    """table[level] of each byte, or in each 16 bits that of the upper byte, with its sign."""
    found = _shuffle_bytes(builder, weights.table, builder.bitcast(levels, BYTES))
    if weights.depths == 4:
        return builder.bitcast(found, INTS)
    return builder.ashr(builder.bitcast(found, WORDS), ir.Constant(WORDS, [8] * (2 * LANES)))


def _look_up_wide(builder: ir.IRBuilder, levels: ir.Value, table: tuple[int, ...]) -> ir.Value:
    """table[level] of each 16 bits, [32] int16: the lower bytes of its numbers and the upper ones, of a table each."""
    if "avx2" not in features():
        words = builder.bitcast(levels, WORDS)
        found = ir.Constant(WORDS, [table[0]] * (2 * LANES))
        for index, value in enumerate(table[1:], 1):
            is_it = builder.icmp_unsigned("==", words, ir.Constant(WORDS, [index] * (2 * LANES)))
            found = builder.select(is_it, ir.Constant(WORDS, [value] * (2 * LANES)), found)
        return found
    nothing = 0x80  # the index of a byte that becomes zero
    lower = builder.or_(levels, ir.Constant(INTS, [nothing << 8 | nothing << 24] * LANES))
    upper = builder.or_(builder.shl(levels, ir.Constant(INTS, [8] * LANES)), ir.Constant(INTS, [0x800080] * LANES))
    halves = [
        _shuffle_bytes(builder, tuple((value >> shift) & 255 for value in table), builder.bitcast(indices, BYTES))
        for shift, indices in ((0, lower), (8, upper))
    ]
    return builder.bitcast(builder.or_(*halves), WORDS)


def _shuffle_bytes(builder: ir.IRBuilder, table: tuple[int, ...], indices: ir.Value) -> ir.Value:
    """table[index], 64 times (x86: PSHUFB; elsewhere, one comparison for each entry)."""
    width = 64 if "avx512bw" in features() else 32 if "avx2" in features() else 0
    if not width:
        found = ir.Constant(BYTES, [table[0] & 255] * (4 * LANES))
        for index, value in enumerate(table[1:], 1):
            is_it = builder.icmp_unsigned("==", indices, ir.Constant(BYTES, [index] * (4 * LANES)))
            found = builder.select(is_it, ir.Constant(BYTES, [value & 255] * (4 * LANES)), found)
        return found
    part = ir.VectorType(I8, width)
    entries = ir.Constant(part, [value & 255 for value in table] * (width // 16))
    name = "llvm.x86.avx512.pshuf.b.512" if width == 64 else "llvm.x86.avx2.pshuf.b"
    if width == 64:
        return call_by_name(builder, name, part, entries, indices)
    halves = []
    for first in (0, 32):
        lanes = ir.Constant(ir.VectorType(I32, 32), list(range(first, first + 32)))
        halves.append(call_by_name(builder, name, part, entries, builder.shuffle_vector(indices, indices, lanes)))
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, 64), list(range(64))))


class Scales(NamedTuple):
    """Of some columns, float32 [16] each."""

    scale: ir.Value
    offset: ir.Value | None


def load_scales(builder: ir.IRBuilder, base: ir.Value, weights: IntegerFormat, group: ir.Value) -> list[Scales]:
    """Those of a group, of its parts that have their own in order. base: the address of a panel's scales, floats
    [groups, factors, 16], or records of 256 depths: float16 [1 or 2, 16], and int8 [8, factors, 16]

    Factors are the scales, then the offsets.
    """
    num_scales, num_factors = weights.num_scales, weights.num_factors
    if not weights.is_two_level:
        first, width = builder.add(base, builder.mul(group, I64(weights.scale_bytes))), weights.factor_width
        places = [builder.add(first, I64(width * LANES * index)) for index in range(num_factors)]
        factors = [load_floats(builder, place, weights.scales) for place in places]
        if not weights.has_offsets:
            return [Scales(scale, None) for scale in factors]
        scale, offset = factors
        return [Scales(scale, builder.fneg(builder.fmul(scale, offset)) if weights.has_zeros else offset)]
    groups = SUPER_GROUP // GROUP
    record = builder.add(base, builder.mul(builder.lshr(group, I64(3)), I64(groups * weights.scale_bytes)))
    commons = [
        load_floats(builder, builder.add(record, I64(2 * LANES * i)), "float16") for i in range(1 + weights.has_offsets)
    ]
    first = builder.add(record, I64(2 * LANES * len(commons)))
    first = builder.add(first, builder.mul(builder.and_(group, I64(groups - 1)), I64(LANES * num_factors)))
    factors = []
    for index in range(num_factors):
        small = load(builder, builder.add(first, I64(LANES * index)), ir.VectorType(I8, LANES), 1)
        value = builder.sitofp(builder.sext(small, INTS), FLOATS)
        factors.append(builder.fmul(value, commons[index // num_scales]))
    offsets = factors[num_scales:] if weights.has_offsets else [None] * num_scales
    return [Scales(*pair) for pair in zip(factors[:num_scales], offsets, strict=True)]


def splat_word(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """32 bits of memory in all lanes, [16] int32."""
    return splat(builder, load(builder, address, I32, 1))
