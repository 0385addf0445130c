"""From words to weights inside a kernel: the packing of `packing`, and the scales of `matrix`, undone in registers.

An integer of up to 7 bits is put into the mantissa of 128.0 (of 1024.0 in float16), where it stands for itself: one
mask and one packed subtraction make two weights (as in Kim et al., "Who Says Elephants Can't Run", 2022). The eighth
bit is one more than bfloat16's mantissa has, and decides instead whether 128 or 256 is taken away.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.compat import INTERPRET

INTEGER, E2M1, TABLE, E4M3_CODES = (tl.constexpr(number) for number in range(4))
VALUES = {"integer": 0, "e2m1": 1, "table": 2, "e4m3": 3}
FLOAT16, BFLOAT16, FLOAT32, E4M3, E8M0 = (tl.constexpr(number) for number in range(5))
SCALES = {"float16": 0, "bfloat16": 1, "float32": 2, "e4m3": 3, "e8m0": 4}


@triton.jit
def load_pairs(
    words_ptr,
    columns,
    is_column,
    units_left,
    stride_block,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    IS_FULL: tl.constexpr,
):
    """Codes of the step that begins at words_ptr, [COLUMNS, STEP // 2] int32: of even inputs below those of odd ones.

    units_left: of the matrix from there on; those beyond have code 0. IS_FULL: there are none, and no column is beyond
    """
    LOW: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else (2 if BITS >= 2 else 1))
    REST: tl.constexpr = BITS - LOW
    LEAST: tl.constexpr = 1 if REST % 2 == 1 else (2 if REST == 2 else LOW)
    pairs = _load_plane(
        words_ptr, columns, is_column, units_left, stride_block, LOW, 0, LEAST, BITS, COLUMNS, STEP, IS_FULL
    )
    if REST >= 2:
        pairs |= (
            _load_plane(
                words_ptr, columns, is_column, units_left, stride_block, 2, LOW, LEAST, BITS, COLUMNS, STEP, IS_FULL
            )
            << LOW
        )
    if REST % 2 == 1:
        pairs |= _load_plane(
            words_ptr, columns, is_column, units_left, stride_block, 1, BITS - 1, LEAST, BITS, COLUMNS, STEP, IS_FULL
        ) << (BITS - 1)
    return pairs


@triton.jit
def _load_plane(
    words_ptr,
    columns,
    is_column,
    units_left,
    stride_block,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    LEAST: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    IS_FULL: tl.constexpr,
):
    """The bits of one plane, from LOW on. LEAST: the width of the narrowest, which decides what a unit is"""
    PER_UNIT: tl.constexpr = WIDTH // LEAST
    numbers = tl.arange(0, STEP * WIDTH // 128)
    units = numbers // PER_UNIT
    blocks = units * (BITS // LEAST) + LOW // LEAST + numbers % PER_UNIT
    lanes = tl.arange(0, 4)
    places = words_ptr + columns[:, None, None] * 4 + blocks[None, :, None] * stride_block + lanes[None, None, :]
    if IS_FULL:
        words = tl.load(places)
    else:
        words = tl.load(places, mask=is_column[:, None, None] & (units < units_left)[None, :, None], other=0)
    shifts = tl.arange(0, 16 // WIDTH) * WIDTH
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * 0x10001
    pairs = (words[:, :, None, :] >> shifts[None, None, :, None]) & MASK
    return pairs.reshape(COLUMNS, STEP // 2)


@triton.jit
def weights_of(
    pairs,
    zeros,
    scales,
    offsets,
    table_ptr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    IS_SCALED: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The weights that pairs of codes stand for, [COLUMNS, STEP] in TYPE, bfloat16, float16 or float32.

    pairs: [COLUMNS, STEP // 2]; zeros, scales, offsets: [COLUMNS, groups] float32, of which scales and offsets are
    applied if IS_SCALED, rounding to TYPE
    """
    COLUMNS: tl.constexpr = pairs.shape[0]
    HALF: tl.constexpr = pairs.shape[1]
    GROUPS: tl.constexpr = zeros.shape[1]
    pairs = pairs.reshape(COLUMNS, GROUPS, HALF // GROUPS)
    zeros, scales, offsets = zeros[:, :, None], scales[:, :, None], offsets[:, :, None]
    if VALUES == TABLE:
        even, odd = tl.load(table_ptr + (pairs & 0xFFFF)), tl.load(table_ptr + (pairs >> 16))
        if IS_SCALED:
            even, odd = even * scales, odd * scales
        weights = tl.join(even, odd).to(TYPE)
    elif TYPE == tl.float32:
        even, odd = _as_float32(pairs, VALUES), _as_float32(pairs >> 16, VALUES)
        if VALUES == INTEGER:
            even, odd = even - zeros, odd - zeros
        if IS_SCALED:
            even, odd = even * scales, odd * scales
            if HAS_OFFSETS:
                even, odd = even + offsets, odd + offsets
        weights = tl.join(even, odd)
    else:
        if VALUES == INTEGER:
            values = _integers(pairs, zeros, BITS, TYPE)
        else:
            values = _small_floats(pairs, VALUES, TYPE)
        if IS_SCALED:
            if HAS_OFFSETS:
                added = _doubled(offsets, TYPE)
            else:
                added = _constant(values, -0x7FFF8000)  # -0.0
            values = _multiply_add(values, _doubled(scales, TYPE), added, TYPE)
        even = (values & 0xFFFF).to(tl.uint16).to(TYPE, bitcast=True)
        odd = ((values >> 16) & 0xFFFF).to(tl.uint16).to(TYPE, bitcast=True)
        weights = tl.join(even, odd)
    return weights.reshape(COLUMNS, 2 * HALF)


@triton.jit
def _as_float32(codes, VALUES: tl.constexpr):
    codes = codes & 0xFFFF
    if VALUES == INTEGER:
        numbers = codes.to(tl.float32)
    elif VALUES == E2M1:
        bits = ((codes & 8) << 28) | ((codes & 7) << 22)
        numbers = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126: the exponent's bias is 127, not 1
    else:
        numbers = _e4m3_as_float32(codes)
    return numbers


@triton.jit
def _e4m3_as_float32(codes):
    bits = ((codes & 0x80) << 24) | ((codes & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120: the exponent's bias is 127, not 7


@triton.jit
def _integers(pairs, zeros, BITS: tl.constexpr, TYPE: tl.constexpr):
    """code - zero of both, exactly, as pairs of TYPE."""
    if TYPE == tl.float16:
        values = pairs | 0x64006400  # 1024 + code
        values = _multiply_add(values, _constant(pairs, 0x3C003C00), _doubled(-1024.0 - zeros, TYPE), TYPE)
    elif BITS < 8:
        values = pairs | 0x43004300  # 128 + code
        values = _multiply_add(values, _constant(pairs, 0x3F803F80), _doubled(-128.0 - zeros, TYPE), TYPE)
    else:
        values = (pairs & 0x007F007F) | 0x43004300
        taken = (pairs & 0x00800080) ^ -0x3C7F3C80  # -256, or -128 where the eighth bit is set: code - 128 is left
        values = _multiply_add(values, _constant(pairs, 0x3F803F80), taken, TYPE)
        values = _multiply_add(values, _constant(pairs, 0x3F803F80), _doubled(128.0 - zeros, TYPE), TYPE)
    return values


@triton.jit
def _small_floats(pairs, VALUES: tl.constexpr, TYPE: tl.constexpr):
    """E2M1 or E4M3 as pairs of TYPE: bits are put where TYPE has such ones, and the exponent's bias is made up for."""
    NOTHING: tl.constexpr = -0x7FFF8000  # -0.0
    if VALUES == E2M1:
        signs, others = (pairs & 0x00080008) << 12, pairs & 0x00070007
        bits = signs | (others << (9 if TYPE == tl.float16 else 6))
        factor = _constant(pairs, 0x74007400 if TYPE == tl.float16 else 0x7E807E80)  # 2**14, 2**126
    else:
        signs, others = (pairs & 0x00800080) << 8, pairs & 0x007F007F
        bits = signs | (others << (7 if TYPE == tl.float16 else 4))
        factor = _constant(pairs, 0x5C005C00 if TYPE == tl.float16 else 0x7B807B80)  # 2**8, 2**120
    return _multiply_add(bits, factor, _constant(pairs, NOTHING), TYPE)


@triton.jit
def _constant(like, BITS: tl.constexpr):
    return tl.full(like.shape, BITS, tl.int32)


@triton.jit
def _doubled(numbers, TYPE: tl.constexpr):
    """Both halves of an int32 as the number rounded to TYPE."""
    return (numbers.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001


@triton.jit
def _multiply_add(a, b, c, TYPE: tl.constexpr):
    """a * b + c of both halves. One instruction on a GPU, which the compiler does not find for itself."""
    if INTERPRET:
        even = _half(a, TYPE) * _half(b, TYPE) + _half(c, TYPE)
        odd = _half(a >> 16, TYPE) * _half(b >> 16, TYPE) + _half(c >> 16, TYPE)
        even = even.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        result = even | (odd.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    elif TYPE == tl.float16:
        result = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        result = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _half(pairs, TYPE: tl.constexpr):
    """The lower one as float32. Subnormal bfloat16 is right too, with which the interpreter's own conversion is not."""
    if TYPE == tl.bfloat16:
        number = (pairs << 16).to(tl.float32, bitcast=True)
    else:
        number = (pairs & 0xFFFF).to(tl.uint16).to(TYPE, bitcast=True).to(tl.float32)
    return number


@triton.jit
def load_scales(scales_ptr, places, is_place, KIND: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr):
    """(scales, zeros) as float32; where there is no place, 0."""
    kept = tl.load(scales_ptr + places, mask=is_place, other=0)
    if KIND == FLOAT16 or KIND == BFLOAT16:
        half = (kept & 0xFFFF).to(tl.uint16)
        scales = half.to(tl.float16 if KIND == FLOAT16 else tl.bfloat16, bitcast=True).to(tl.float32)
        zeros = (kept >> 16).to(tl.float32)
    else:
        if KIND == FLOAT32:
            scales = kept
        elif KIND == E8M0:
            scales = (kept.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        else:
            scales = _e4m3_as_float32(kept.to(tl.int32))
        zeros = tl.full(scales.shape, 2 ** (BITS - 1) if VALUES == INTEGER else 0, tl.float32)
    return scales, zeros
