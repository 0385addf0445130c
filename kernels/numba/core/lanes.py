"""LLVM vectors of 16 lanes, and the loops over them that LLVM would not vectorise by itself.

LLVM splits a vector into two registers of AVX2, four of NEON, or one of AVX-512. Addresses are integers.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.layout import PANEL
from kernels.numba.core.formats import GROUP

LANES = PANEL  # a vector is one row of a panel
STEPS = 32767.0  # of a 16-bit integer, on either side of zero
BYTE_STEPS = 254.0  # from the smallest to the largest of a group as 8-bit integers: with zero rounded, at most 255

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(I32, LANES)


def splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """A scalar in all lanes."""
    vector = ir.VectorType(scalar.type, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(INTS, [0] * LANES))


def constant(value: float) -> ir.Constant:
    """A number, rounded to float32, in all lanes."""
    return ir.Constant(FLOATS, [value] * LANES)


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 4) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def call_by_name(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    """Calls one of LLVM's intrinsics, or a function of the C library."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return call_by_name(builder, f"llvm.fma.v{LANES}f32", FLOATS, a, b, c)


def load_floats(builder: ir.IRBuilder, address: ir.Value, element: str) -> ir.Value:
    """16 consecutive elements as float32, exactly; those of float8 times 2^-8."""
    if element == "float32":
        return load(builder, address, FLOATS, 4)
    if element == "int8":
        return builder.sitofp(builder.sext(load(builder, address, ir.VectorType(I8, LANES), 1), INTS), FLOATS)
    if element == "float8":  # e4m3, of which float16 has the same bits, but for 2^8 in the exponent: here without it
        wide = builder.zext(load(builder, address, ir.VectorType(I8, LANES), 1), ir.VectorType(I16, LANES))
        kind = wide.type
        spread = builder.ashr(builder.shl(wide, ir.Constant(kind, [8] * LANES)), ir.Constant(kind, [1] * LANES))
        half = builder.and_(spread, ir.Constant(kind, [0xBF80] * LANES))
        return builder.fpext(builder.bitcast(half, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
    bits = load(builder, address, ir.VectorType(I16, LANES), 2)
    if element == "bfloat16":  # the upper half of a float32
        wide = builder.shl(builder.zext(bits, INTS), ir.Constant(INTS, [16] * LANES))
        return builder.bitcast(wide, FLOATS)
    return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), FLOATS)


def exponential(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x within 2 units in the last place from -87.3 to 88; e^-87.3 below, 0 below -1e9; e^88 above; NaN of NaN.

    x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial for e^r (coefficients of Cephes, Moshier 1992).
    """
    is_nothing = builder.fcmp_ordered("<", x, constant(-1e9))
    low = builder.select(builder.fcmp_ordered("<", x, constant(-87.3)), constant(-87.3), x)
    x = builder.select(builder.fcmp_ordered(">", low, constant(88.0)), constant(88.0), low)
    n = call_by_name(builder, f"llvm.rint.v{LANES}f32", FLOATS, builder.fmul(x, constant(1.44269504)))
    r = fma(builder, n, constant(-0.693359375), x)
    r = fma(builder, n, constant(2.12194440e-4), r)
    p = constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(builder, p, r, constant(coefficient))
    p = builder.fadd(fma(builder, p, builder.fmul(r, r), r), constant(1.0))
    # converting NaN to an integer is undefined, so 0 takes its place; the product is still NaN, since p is
    whole = builder.select(builder.fcmp_unordered("uno", x, x), constant(0.0), n)
    power = builder.shl(
        builder.add(builder.fptosi(whole, INTS), ir.Constant(INTS, [127] * LANES)), ir.Constant(INTS, [23] * LANES)
    )
    return builder.select(is_nothing, constant(0.0), builder.fmul(p, builder.bitcast(power, FLOATS)))


class Loop:
    """The blocks of `for index in range(count)`, with values carried from one iteration to the next."""

    def __init__(self, builder: ir.IRBuilder, count: ir.Value, carried: list[ir.Value]) -> None:
        self.builder, self.count = builder, count
        before = builder.block
        self.head = builder.append_basic_block("head")
        self.body = builder.append_basic_block("body")
        self.end = builder.append_basic_block("end")
        builder.branch(self.head)
        builder.position_at_end(self.head)
        self.index = builder.phi(I64)
        self.index.add_incoming(I64(0), before)
        self.values = [builder.phi(value.type) for value in carried]
        for phi, value in zip(self.values, carried, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", self.index, count), self.body, self.end)
        builder.position_at_end(self.body)

    def close(self, carried: list[ir.Value]) -> list[ir.Value]:
        """Ends the body with the carried values of the next iteration; returns those after the last."""
        builder = self.builder
        self.index.add_incoming(builder.add(self.index, I64(1)), builder.block)
        for phi, value in zip(self.values, carried, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(self.head)
        builder.position_at_end(self.end)
        return list(self.values)


def define(module: ir.Module, name: str, num_arguments: int) -> tuple[ir.Function, bool]:
    """A function of that many integers, and whether its body is still to be written."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * num_arguments)
    function = cgutils.get_or_insert_function(module, kind, name)
    is_new = not function.blocks
    if is_new:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
    return function, is_new


@intrinsic
def exponentiate(typing_context, scores, count, largest):
    """scores = e^(scores - largest), float32 [16 * count] at an address; returns their sum: over the vectors
    in each lane first, then over the lanes."""

    def generate(context, builder, signature, arguments):
        address, num_vectors, row_max = arguments
        row_maxima = splat(builder, row_max)
        loop = Loop(builder, num_vectors, [constant(0.0)])
        vector = builder.add(address, builder.mul(loop.index, I64(4 * LANES)))
        weights = exponential(builder, builder.fsub(load_floats(builder, vector, "float32"), row_maxima))
        store(builder, weights, vector)
        (total,) = loop.close([builder.fadd(loop.values[0], weights)])
        return sum_lanes(builder, total)

    return types.float32(types.int64, types.int64, types.float32), generate


@intrinsic
def largest_of(typing_context, scores, count, floor):
    """The largest of `floor` and float32 [16 * count] at an address; NaN is ignored."""

    def generate(context, builder, signature, arguments):
        address, num_vectors, least = arguments
        loop = Loop(builder, num_vectors, [splat(builder, least)])
        values = load_floats(builder, builder.add(address, builder.mul(loop.index, I64(4 * LANES))), "float32")
        is_larger = builder.fcmp_ordered(">", values, loop.values[0])
        (largest,) = loop.close([builder.select(is_larger, values, loop.values[0])])
        return call_by_name(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, largest)

    return types.float32(types.int64, types.int64, types.float32), generate


@intrinsic
def largest_magnitude(typing_context, x, count):
    """The largest magnitude of float32 [16 * count] at an address; NaN where any is NaN or infinite."""

    def generate(context, builder, signature, arguments):
        address, num_vectors = arguments
        loop = Loop(builder, num_vectors, [constant(0.0), constant(0.0)])
        values = load_floats(builder, builder.add(address, builder.mul(loop.index, I64(4 * LANES))), "float32")
        sizes = call_by_name(builder, f"llvm.fabs.v{LANES}f32", FLOATS, values)
        is_larger = builder.fcmp_ordered(">", sizes, loop.values[0])
        nothing = builder.fmul(values, constant(0.0))  # but NaN of NaN and of infinity
        largest, signs = loop.close(
            [builder.select(is_larger, sizes, loop.values[0]), builder.fadd(loop.values[1], nothing)]
        )
        found = call_by_name(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, largest)
        return builder.fadd(found, sum_lanes(builder, signs))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def multiply_vectors(typing_context, x, factors, count):
    """x *= factors, float32 [16 * count] each, at addresses."""

    def generate(context, builder, signature, arguments):
        x, factors, num_vectors = arguments
        loop = Loop(builder, num_vectors, [])
        offset = builder.mul(loop.index, I64(4 * LANES))
        address = builder.add(x, offset)
        values, by = (load_floats(builder, base, "float32") for base in (address, builder.add(factors, offset)))
        store(builder, builder.fmul(values, by), address)
        loop.close([])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


def sum_lanes(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The sum of all lanes, halves first."""
    width = LANES
    while width > 1:
        width //= 2
        parts = [
            builder.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(I32, width), list(range(first, first + width)))
            )
            for first in (0, width)
        ]
        vector = builder.fadd(*parts)
    return builder.extract_element(vector, I32(0))


@intrinsic
def silu_and_multiply(typing_context, gate, up, out, count):
    """out = gate / (1 + e^-gate) * up, float32 [16 * count] each."""

    def generate(context, builder, signature, arguments):
        loop = Loop(builder, arguments[3], [])
        offset = builder.mul(loop.index, I64(4 * LANES))
        gates, ups = (load_floats(builder, builder.add(base, offset), "float32") for base in arguments[:2])
        below = builder.fadd(constant(1.0), exponential(builder, builder.fneg(gates)))
        store(builder, builder.fmul(builder.fdiv(gates, below), ups), builder.add(arguments[2], offset))
        loop.close([])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def round_groups(typing_context, x, out, factors, count):
    """Rounds groups of 32 to 16-bit integers: float32 [count, 32] -> int16 [count, 32], and of each group four times 32
    bits: its scale and the scale times the sum of its integers, float32, and the sums of either half of them, int32."""

    def generate(context, builder, signature, arguments):
        source, target, out_factors, num_groups = arguments
        loop = Loop(builder, num_groups, [])
        start = builder.add(source, builder.mul(loop.index, I64(4 * GROUP)))
        halves = [load_floats(builder, builder.add(start, I64(4 * LANES * half)), "float32") for half in (0, 1)]
        sizes = [call_by_name(builder, f"llvm.fabs.v{LANES}f32", FLOATS, half) for half in halves]
        largest = builder.select(builder.fcmp_ordered(">", sizes[0], sizes[1]), *sizes)
        absmax = call_by_name(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, largest)
        is_some = builder.fcmp_ordered(">", absmax, ir.Constant(FLOAT, 1e-30))
        steps = ir.Constant(FLOAT, STEPS)
        inverse = builder.select(is_some, builder.fdiv(steps, absmax), ir.Constant(FLOAT, 0.0))
        integers = [_round(builder, half, splat(builder, inverse)) for half in halves]
        address = builder.add(target, builder.mul(loop.index, I64(2 * GROUP)))
        for half, values in enumerate(integers):
            words = builder.trunc(values, ir.VectorType(I16, LANES))
            store(builder, words, builder.add(address, I64(2 * LANES * half)), 2)
        sums = [_sum_of_integers(builder, values) for values in integers]
        scale = _unless_nan(builder, halves, builder.fdiv(absmax, steps))
        weighed = builder.fmul(scale, builder.sitofp(builder.add(*sums), FLOAT))
        address = builder.add(out_factors, builder.mul(loop.index, I64(16)))
        for place, factor in enumerate((scale, weighed, *sums)):
            store(builder, factor, builder.add(address, I64(4 * place)))
        loop.close([])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def round_groups_to_bytes(typing_context, x, out, factors, count):
    """Rounds groups of 32 to unsigned 8-bit integers, of which one stands for zero: float32 [count, 32] -> uint8
    [count, 32], and of each group four times 32 bits: its scale, that integer with a minus, the scale times the sum of
    the integers less it, float32; and of either half of them that sum, int16."""

    def generate(context, builder, signature, arguments):
        source, target, out_factors, num_groups = arguments
        loop = Loop(builder, num_groups, [])
        start = builder.add(source, builder.mul(loop.index, I64(4 * GROUP)))
        halves = [load_floats(builder, builder.add(start, I64(4 * LANES * half)), "float32") for half in (0, 1)]
        low, high = (_extreme(builder, halves, sign, name) for sign, name in (("<", "fmin"), (">", "fmax")))
        share = ir.Constant(FLOAT, 1 / BYTE_STEPS)  # of each, since their difference may be infinite
        scale = builder.fsub(builder.fmul(high, share), builder.fmul(low, share))
        is_some = builder.fcmp_ordered(">", scale, ir.Constant(FLOAT, 1e-30))
        inverse = builder.select(is_some, builder.fdiv(ir.Constant(FLOAT, 1.0), scale), ir.Constant(FLOAT, 0.0))
        zero = call_by_name(builder, "llvm.rint.f32", FLOAT, builder.fmul(low, inverse))  # negative, or nothing
        zeros = builder.fptosi(splat(builder, zero), INTS)
        integers = [_round(builder, half, splat(builder, inverse)) for half in halves]
        address = builder.add(target, builder.mul(loop.index, I64(GROUP)))
        for half, values in enumerate(integers):
            narrow = builder.trunc(builder.sub(values, zeros), ir.VectorType(I8, LANES))
            store(builder, narrow, builder.add(address, I64(LANES * half)), 1)
        sums = [_sum_of_integers(builder, values) for values in integers]
        scale = _unless_nan(builder, halves, scale)
        weighed = builder.fmul(scale, builder.sitofp(builder.add(*sums), FLOAT))
        address = builder.add(out_factors, builder.mul(loop.index, I64(16)))
        for place, factor in enumerate((scale, zero, weighed)):
            store(builder, factor, builder.add(address, I64(4 * place)))
        for half, total in enumerate(sums):
            store(builder, builder.trunc(total, I16), builder.add(address, I64(12 + 2 * half)), 2)
        loop.close([])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _round(builder: ir.IRBuilder, values: ir.Value, inverses: ir.Value) -> ir.Value:
    """values * inverses as the nearest integers, [16] int32."""
    whole = call_by_name(builder, f"llvm.rint.v{LANES}f32", FLOATS, builder.fmul(values, inverses))
    return builder.fptosi(whole, INTS)


def _sum_of_integers(builder: ir.IRBuilder, values: ir.Value) -> ir.Value:
    return call_by_name(builder, f"llvm.vector.reduce.add.v{LANES}i32", I32, values)


def _extreme(builder: ir.IRBuilder, halves: list[ir.Value], sign: str, name: str) -> ir.Value:
    """The smallest (<, fmin) or largest (>, fmax) of two vectors and zero."""
    both = builder.select(builder.fcmp_ordered(sign, *halves), *halves)
    found = call_by_name(builder, f"llvm.vector.reduce.{name}.v{LANES}f32", FLOAT, both)
    zero = ir.Constant(FLOAT, 0.0)
    return builder.select(builder.fcmp_ordered(sign, found, zero), found, zero)


def _unless_nan(builder: ir.IRBuilder, halves: list[ir.Value], scale: ir.Value) -> ir.Value:
    """A scale, or NaN where the group has any: its reduction to an extreme and the conversion to integers drop it."""
    ordered = builder.fcmp_ordered("ord", *halves)
    are_numbers = call_by_name(builder, f"llvm.vector.reduce.and.v{LANES}i1", ir.IntType(1), ordered)
    return builder.select(are_numbers, scale, ir.Constant(FLOAT, math.nan))
