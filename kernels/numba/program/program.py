"""A model's step as a list of operations that a team of threads works off together, without Python in between.

An operation is divided into units. Threads take units from a shared counter, and go on to the next operation when all
units of this one are done: a thread that the operating system has descheduled delays the others only while it has a
unit.
"""

from __future__ import annotations

import platform
from enum import IntEnum

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kernels.layout import MAX_ROTATIONS
from kernels.numba.core.lanes import call_by_name
from kernels.numba.core.memory import add_to_counter, floats, integers, read_counter, write_counter
from kernels.numba.core.processor import LINE
from kernels.numba.kernel_cache import kernel
from kernels.numba.ops.attention import NUM_TILE_FIELDS, attend_unit
from kernels.numba.ops.elementwise import (
    copy_rows,
    fill_rows,
    gather_rows,
    normalise_parts,
    normalise_rows,
    permute_rows,
    quantise_rows,
    quantise_rows_to_bytes,
    rotate_and_store_rows,
    round_rows,
    silu_and_multiply_rows,
)
from kernels.numba.ops.experts import ARRANGE, NUM_BLOCK_FIELDS, call_expert_operation, most_blocks
from kernels.numba.ops.linear import BLOCK_ROWS, call_product
from kernels.numba.ops.tables import call_row

MAX_BLOCK_TABLES = 8  # of a sequence: one for each group of layers
NUM_STEP_FIELDS = 40
NUM_FIELDS = 24  # integers of an operation; the last two: the `Step` field that counts its rows, the bits of two floats


class Operation(IntEnum):
    """The kinds of operation: field 0 of each. `_run_unit` says what the other fields are."""

    GATHER = 0
    NORMALISE = 1
    QUANTISE = 2
    FILL = 3
    MULTIPLY = 4
    ROTATE_AND_STORE = 5
    ATTEND = 6
    SILU_AND_MULTIPLY = 7
    COPY = 8
    ROUND = 9
    QUANTISE_TO_BYTES = 10
    GATHER_PACKED = 11
    PERMUTE = 12
    NORMALISE_PARTS = 13
    OF_EXPERTS = 14
    MULTIPLY_EXPERTS = 15


class Step(IntEnum):
    """The integers that all operations of a step share: sizes, and addresses of its inputs."""

    ROWS = 0
    INPUT_IDS = 1
    POSITIONS = 2
    TREE = 3
    TREE_WIDTH = 4
    NUM_TILES = 5  # of attention
    TILES = 6  # address of the tiles, see `kernels.numba.ops.attention.cut_tiles`
    NUM_LOGITS = 7
    LOGITS_ROWS = 8
    PAIRS = 9  # of a row and one of its experts
    ROTATIONS = 10  # addresses of cos and sin of each rotation of the model, up to MAX_ROTATIONS, for every position
    SLOTS = ROTATIONS + 2 * MAX_ROTATIONS  # of each group of layers, up to MAX_BLOCK_TABLES: address of the rows' slots
    TABLES = SLOTS + MAX_BLOCK_TABLES  # likewise: bytes from a tile's block table to its sequence's in this group


class Control(IntEnum):
    """The counters by which the threads of a team synchronise, each in a cache line of its own."""

    GENERATION = 0  # programs opened so far; followers wait for a change
    OPEN = 1  # whether followers may join the program
    INSIDE = 2  # followers in the program
    COUNTERS = 3  # of each operation: units taken, units done


_GATHER, _NORMALISE, _QUANTISE, _FILL, _MULTIPLY, _STORE, _ATTEND = map(int, list(Operation)[:7])
_SILU, _COPY, _ROUND, _TO_BYTES, _GATHER_PACKED, _PERMUTE = map(int, list(Operation)[7:13])
_PARTS, _OF_EXPERTS, _EXPERTS = map(int, list(Operation)[13:])
_POSITIONS, _TREE, _TREE_WIDTH = int(Step.POSITIONS), int(Step.TREE), int(Step.TREE_WIDTH)
_NUM_TILES, _TILES, _TABLES = int(Step.NUM_TILES), int(Step.TILES), int(Step.TABLES)
_ROTATIONS, _SLOTS = int(Step.ROTATIONS), int(Step.SLOTS)
_GENERATION, _OPEN, _INSIDE, _COUNTERS = (int(c) * LINE for c in Control)
_ROWS_AT_ONCE = 8
_SPINS_BEFORE_YIELD = 4096


@intrinsic
def _pause(typing_context):
    """The PAUSE instruction of x86, for spin loops; nothing elsewhere."""

    def generate(context, builder, signature, arguments):
        if platform.machine() in ("x86_64", "AMD64"):
            call_by_name(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _give_up_core(typing_context):
    """sched_yield(2)"""

    def generate(context, builder, signature, arguments):
        call_by_name(builder, "sched_yield", ir.IntType(32))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _cycles(typing_context):
    """The processor's cycle counter."""

    def generate(context, builder, signature, arguments):
        return call_by_name(builder, "llvm.readcyclecounter", ir.IntType(64))

    return types.int64(), generate


@njit(inline="always")
def count_units(op, step):
    """From what stays as it is for the whole step: a thread may count when the others have gone on, and have written
    over what this operation read.
    """
    kind, rows = op[0], step[op[NUM_FIELDS - 2]]
    if kind == _MULTIPLY:
        return -(-rows // BLOCK_ROWS) * -(-op[7] // op[8])
    if kind == _ATTEND:
        return step[_NUM_TILES] * op[4]
    if kind == _EXPERTS:
        return most_blocks(rows, op[14]) * -(-op[7] // op[8])
    if kind == _OF_EXPERTS and op[2] == ARRANGE:
        return min(1, rows)
    return -(-rows // _ROWS_AT_ONCE)


@njit(inline="always")
def _multiply_experts(unit, op, scratch):
    """A block of pairs of one expert, by some panels of its matrix; nothing, if there are fewer blocks. Fields as of
    MULTIPLY, but for

    op[5]: int64 [num_experts, 2], addresses of each matrix's values and scales; zeros: another operation has it
    op[6]: the blocks of `arrange_pairs`; op[12], op[13]: bytes of a pair's row and of its factors; op[14]: num_experts
    """
    runs = -(-op[7] // op[8])
    if unit // runs >= integers(op[6], 1)[0]:
        return
    block = integers(op[6] + (1 + NUM_BLOCK_FIELDS * (unit // runs)) * 8, NUM_BLOCK_FIELDS)
    matrix, first = integers(op[5] + block[0] * 16, 2), block[1]
    if matrix[0] != 0:
        call_product(
            op[1],
            (unit % runs, op[2] + first * op[12], op[3] + first * op[13], block[2], op[4], matrix[0], matrix[1], op[7],
             op[8], op[9] + first * op[10] * 4, op[10], op[11], scratch),
        )  # fmt: skip


@njit(inline="always")
def _run_unit(unit, address, op_floats, step, scratch):
    op = integers(address, NUM_FIELDS)
    kind = op[0]
    rows = step[op[NUM_FIELDS - 2]]
    first = unit * _ROWS_AT_ONCE
    last = min(first + _ROWS_AT_ONCE, rows)
    if kind == _MULTIPLY:
        call_product(
            op[1], (unit, op[2], op[3], rows, op[4], op[5], op[6], op[7], op[8], op[9], op[10], op[11], scratch)
        )
    elif kind == _ATTEND:
        kv_head, tile = unit % op[4], integers(step[_TILES] + unit // op[4] * NUM_TILE_FIELDS * 8, NUM_TILE_FIELDS)
        attend_unit(
            (op[1], op[2], op[3], op[4], op[5], op_floats[0], op_floats[1], op[6], op[7], op[8], op[9], op[10],
             op[11], op[12], tile[0], tile[1], kv_head, tile[2], tile[3], tile[4], step[_POSITIONS],
             tile[5] + step[_TABLES + op[13]], step[_TREE], step[_TREE_WIDTH], scratch)
        )  # fmt: skip
    elif kind == _EXPERTS:
        _multiply_experts(unit, op, scratch)
    elif kind == _NORMALISE:
        normalise_rows(op[1], op[2], op[3], first, last, op[4], op_floats[0])
    elif kind == _QUANTISE:
        quantise_rows(op[1], op[2], op[3], first, last, op[4])
    elif kind == _TO_BYTES:
        quantise_rows_to_bytes(op[1], op[2], op[3], first, last, op[4])
    elif kind == _ROUND:
        round_rows(op[1], op[2], first, last, op[3])
    elif kind == _STORE:
        cos, sin = (step[_ROTATIONS + 2 * op[7]], step[_ROTATIONS + 2 * op[7] + 1]) if op[8] != 0 else (0, 0)
        rotate_and_store_rows(
            op[1], first, last, op[2], op[3], op[4], op[5], op[6], op_floats[0], step[_POSITIONS], cos, sin, op[8],
            step[_SLOTS + op[15]],
            op[9], op[10], op[11], op[12], op[13], op[14],
        )  # fmt: skip
    elif kind == _SILU:
        silu_and_multiply_rows(op[1], op[2], first, last, op[3])
    elif kind == _COPY:
        copy_rows(op[1], op[2], first, last, op[3])
    elif kind == _PERMUTE:
        permute_rows(op[1], op[2], op[3], first, last, op[4])
    elif kind == _PARTS:
        normalise_parts(op[1], op[2], first, last, op[3], op[4], op_floats[0])
    elif kind == _OF_EXPERTS:
        call_expert_operation(op[1], (address + 2 * 8, first, last, rows))
    elif kind == _FILL:
        fill_rows(op[1], op[2], first, last, op[3], op[4])
    elif kind == _GATHER:
        gather_rows(op[1], op[2], step[op[5]], op[3], first, last, op[4])
    elif kind == _GATHER_PACKED:
        indices = integers(step[op[6]], last)
        for row in range(first, last):
            call_row(op[1], (op[2], op[3], op[5], indices[row], op[4] + row * op[5] * 4))


@njit(inline="always")
def _work(program, num_ops, step_address, control, scratch, times):
    step = integers(step_address, NUM_STEP_FIELDS)
    if times != 0:
        integers(times, 1)[0] = _cycles()
    for index in range(num_ops):
        address = program + index * NUM_FIELDS * 8
        op = integers(address, NUM_FIELDS)
        op_floats = floats(program + (index * NUM_FIELDS + NUM_FIELDS - 1) * 8, 2)
        taken = control + _COUNTERS + index * 2 * LINE
        done = taken + LINE
        num_units = count_units(op, step)
        while True:
            unit = add_to_counter(taken, 1)
            if unit >= num_units:
                break
            _run_unit(unit, address, op_floats, step, scratch)
            add_to_counter(done, 1)
        spins = 0
        while read_counter(done) < num_units:
            _pause()
            spins += 1
            if spins % _SPINS_BEFORE_YIELD == 0:
                _give_up_core()
        if times != 0:
            integers(times, num_ops + 1)[index + 1] = _cycles()


@kernel("void(int64)")
def open_program(control):
    """Lets followers join the program that the caller, the leader, runs next; they see all that it wrote before."""
    write_counter(control + _OPEN, 1)
    add_to_counter(control + _GENERATION, 1)


@kernel("int64(int64,int64,int64,int64,int64,int64)", nogil=True)
def run(call, control, scratch, times, seen, num_spins):
    """Runs programs on the calling thread, without the interpreter's lock.

    The leader calls it with `num_spins` 0: it runs one program together with the followers that join, and returns when
    the program is done and all followers have left it. A follower joins programs as they are opened, and returns the
    last generation that it has seen when none was opened during `num_spins` iterations.

    call: int64 [3]: the program, int64 [num_ops, NUM_FIELDS]; num_ops; the step, int64 [NUM_STEP_FIELDS], see `Step`
    control: see `Control`; scratch: memory of this thread
    times: int64 [1 + num_ops], where the leader notes the cycle counter before and after each operation, or 0
    """
    what = integers(call, 3)
    spins = 0
    while True:
        if num_spins > 0:
            generation = read_counter(control + _GENERATION)
            if generation == seen:
                spins += 1
                if spins > num_spins:
                    return seen
                _pause()
                continue
            seen, spins = generation, 0
            add_to_counter(control + _INSIDE, 1)
        if num_spins == 0 or read_counter(control + _OPEN) > 0:
            _work(what[0], what[1], what[2], control, scratch, times)
        if num_spins == 0:
            break
        add_to_counter(control + _INSIDE, -1)
    add_to_counter(control + _OPEN, -1)
    while read_counter(control + _INSIDE) > 0:
        _pause()
    return seen
