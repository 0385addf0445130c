"""How fast does this processor multiply? `python -m loadtest.micro.instruction_rates [--threads 2] [--save]`

Billions of multiplications and additions a second of each instruction that register tiles are made of, with one operand
in a register and the other in the L1 cache, and enough sums at once to hide its latency: what no tile can exceed. Of
one thread, times their number, in the best of many short runs, so that others' load cannot lower it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from kernels.numba.core import integer_tiles, tiles
from kernels.numba.core.formats import INTEGERS, ROUNDED_BFLOAT16
from kernels.numba.core.lanes import FLOATS, I32, I64, INTS, LANES, Loop, fma, load
from kernels.numba.core.processor import level
from loadtest.micro.measure import Row, parse_arguments, report

NUM_SUMS = level().floats.one_panel  # which registers hold, beside operands
NUM_OPERANDS = 8  # of the L1 cache, a power of two
NUM_ITERATIONS, NUM_RUNS = 20_000, 200
PAIRS, BYTES = ir.VectorType(ir.IntType(16), 2 * LANES), INTS
Add = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]


# What tiles add up, the vectors that they add, those of the sums, and multiply-adds in a lane.
_KINDS: dict[str, tuple[Add, ir.Type, ir.Type, int]] = {
    "float32": (lambda builder, total, a, b: fma(builder, a, b, total), FLOATS, FLOATS, 1),
    "bfloat16": (tiles.add_bfloat16_products, INTS, FLOATS, 2),
    "int16": (integer_tiles.add_pair_products, PAIRS, INTS, 2),
    "int8": (integer_tiles.add_quad_products, BYTES, INTS, 4),
}


def instruction_of(kind: int) -> str:
    """What products of this kind (of `kernels.numba.core.formats`) multiply: a name of `rates`."""
    if kind in INTEGERS:
        return "int16" if INTEGERS[kind].depths == 2 else "int8"
    return "bfloat16" if kind == ROUNDED_BFLOAT16 else "float32"


def rate(name: str, num_threads: int) -> float:
    """Operations per second, two for each multiply-add, of all threads together."""
    run, per_lane = _compiled(name), _KINDS[name][3]
    operands = np.ones(NUM_OPERANDS * LANES, np.int32)
    best = float("inf")
    for _ in range(NUM_RUNS):
        start = time.perf_counter()
        run(operands.ctypes.data, NUM_ITERATIONS)
        best = min(best, time.perf_counter() - start)
    return num_threads * 2 * per_lane * LANES * NUM_SUMS * NUM_ITERATIONS / best


def _compiled(name: str) -> Callable[[int, int], float]:
    add, operand, total, _ = _KINDS[name]

    @intrinsic
    def sums_of(typing_context, operands, count):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            address, num_iterations = arguments
            registers = load(builder, address, operand, 4)
            loop = Loop(builder, num_iterations, [ir.Constant(total, None)] * NUM_SUMS)
            place = builder.mul(builder.and_(loop.index, I64(NUM_OPERANDS - 1)), I64(4 * LANES))
            other = load(builder, builder.add(address, place), operand, 4)
            results = loop.close([add(builder, before, registers, other) for before in loop.values])
            lanes = [builder.extract_element(builder.bitcast(one, INTS), I32(0)) for one in results]
            for lane in lanes[1:]:
                lanes[0] = builder.xor(lanes[0], lane)
            return lanes[0]

        return types.int32(types.int64, types.int64), generate

    @njit  # type: ignore[untyped-decorator]
    def run(operands: int, count: int) -> int:
        return sums_of(operands, count)  # type: ignore[no-any-return]

    run(np.ones(NUM_OPERANDS * LANES, np.int32).ctypes.data, 1)
    return run  # type: ignore[no-any-return]


def main() -> None:
    arguments = parse_arguments(main.__doc__ or __doc__ or "")
    rows: list[Row] = [
        {"instruction of": name, "GOP/s": rate(name, arguments.threads) / 1e9, "level": level().name} for name in _KINDS
    ]
    report("instruction-rates", rows, arguments)


if __name__ == "__main__":
    main()
