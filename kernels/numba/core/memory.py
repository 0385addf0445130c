"""Access to memory from compiled code: arrays at addresses, atomic counters, half-precision elements."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _array_of(element):
    """An intrinsic (address, length) that makes an array of the memory there: in no time, to compile and to run."""
    array = types.Array(element, 1, "C")
    size = element.bitwidth // 8

    @intrinsic
    def view(typing_context, address, length):
        def generate(context, builder, signature, arguments):
            address, length = arguments
            struct = context.make_array(array)(context, builder)
            data = builder.inttoptr(address, struct.data.type)
            populate_array(struct, data, [length], [_I64(size)], _I64(size), None)
            return struct._getvalue()

        return array(types.int64, types.int64), generate

    return view


floats, words, integers, flags, codes = map(
    _array_of, (types.float32, types.int16, types.int64, types.uint8, types.int8)
)


def _counter(builder, address):
    return builder.inttoptr(address, _I64.as_pointer())


@intrinsic
def add_to_counter(typing_context, address, amount):
    """Adds to the int64 at an address atomically, sequentially consistent; returns the value before."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _counter(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def read_counter(typing_context, address):
    """Loads the int64 at an address atomically, sequentially consistent.

    All that a thread wrote before it changed the counter to this value is visible after the load.
    """

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_counter(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def write_counter(typing_context, address, value):
    """Stores the int64 at an address atomically, sequentially consistent: see `read_counter`."""

    def generate(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], _counter(builder, arguments[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def float_bits(typing_context, value):
    """The bits of a float32, as int32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), generate


@intrinsic
def bits_float(typing_context, bits):
    """The float32 of these bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def to_float16_bits(typing_context, value):
    """A float32 rounded to float16, as its bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), _I16)

    return types.int16(types.float32), generate


@njit(inline="always")
def to_bfloat16_bits(value):
    """A float32 rounded to the nearest bfloat16 (to even between two), as its bits."""
    bits = float_bits(np.float32(value))
    return np.int16((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16))


@njit(inline="always")
def bfloat16_value(bits):
    """The float32 of a bfloat16's bits."""
    return bits_float(np.int32(bits) << np.int32(16))


@intrinsic
def float16_value(typing_context, bits):
    """The float32 of a float16's bits."""

    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate
