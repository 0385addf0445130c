"""The operations of a mixture of experts around its products: which experts a row goes to, pairs of a row and an expert
in the order of experts, and the sum of what comes of them.

A pair has a number, row * top_k + rank, and a place among the pairs of its expert. Each function but `arrange_pairs`
computes some rows, or some pairs, in float32; its result does not depend on the others. They are a kernel of their own,
compiled, or read from the cache, when a model has experts.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numba import njit, types

from kernels.numba.core.memory import floats, integers
from kernels.numba.core.tiles import rows_of_next_tile
from kernels.numba.kernel_cache import address_of, by_address, kernel, named
from kernels.numba.ops.linear import BLOCK_ROWS

ROUTE, ARRANGE, TAKE, PERMUTE, ADD_PARTS, ADD_GATED = range(6)  # the operations, as the first of their fields
NUM_FIELDS = 10
NUM_BLOCK_FIELDS = 3  # of a block of pairs: its expert, its first place, its pairs
_SIGNATURE = types.void(*[types.int64] * 4)
call_expert_operation = by_address(_SIGNATURE)
_FUSED = {"contract"}
_TAKEN = np.float32(-1.0)


@njit
def route_rows(logits, stride, num_experts, top_k, normalises, weights, experts, first, last):
    """As `kernels.reference.moe.route`, for rows first..last; the logits are overwritten.

    logits: float32 [rows, stride]; weights: float32 [rows, top_k]; experts: int64 [rows, top_k], all different, even
    where logits are no numbers
    """
    for row in range(first, last):
        shares = floats(logits + row * stride * 4, num_experts)
        kept, chosen = floats(weights + row * top_k * 4, top_k), integers(experts + row * top_k * 8, top_k)
        largest, total = shares[0], np.float32(0.0)
        for expert in range(1, num_experts):
            largest = max(largest, shares[expert])
        for expert in range(num_experts):
            shares[expert] = np.float32(math.exp(shares[expert] - largest))
            total += shares[expert]
        for expert in range(num_experts):
            shares[expert] /= total
        sum_of_kept = np.float32(0.0)
        for rank in range(top_k):
            best = -1
            for expert in range(num_experts):
                if shares[expert] != _TAKEN and (best < 0 or shares[expert] > shares[best]):
                    best = expert
            kept[rank], chosen[rank] = shares[best], best
            sum_of_kept += shares[best]
            shares[best] = _TAKEN
        if normalises != 0:
            for rank in range(top_k):
                kept[rank] /= sum_of_kept


@njit
def arrange_pairs(experts, num_pairs, top_k, num_experts, ends, places, sources, owners, blocks):
    """Sorts pairs by expert, those of one in the order of their numbers, and cuts them into blocks of BLOCK_ROWS or
    fewer.

    experts: int64 [pairs]; ends: int64 [num_experts], where each expert's pairs end; places: int64 [pairs], by number
    sources, owners: int64 [pairs], by place: the row and the expert
    blocks: int64, their number, and then NUM_BLOCK_FIELDS of each
    """
    chosen, after = integers(experts, num_pairs), integers(ends, num_experts)
    for expert in range(num_experts):
        after[expert] = 0
    for pair in range(num_pairs):
        after[chosen[pair]] += 1
    start = 0
    for expert in range(num_experts):
        count = after[expert]
        after[expert] = start  # until its pairs are placed
        start += count
    of_pair, rows, of_place = integers(places, num_pairs), integers(sources, num_pairs), integers(owners, num_pairs)
    for pair in range(num_pairs):
        place = after[chosen[pair]]
        of_pair[pair], rows[place], of_place[place] = place, pair // top_k, chosen[pair]
        after[chosen[pair]] = place + 1
    num_blocks, start = 0, 0
    for expert in range(num_experts):
        while start < after[expert]:
            block = integers(blocks + (1 + NUM_BLOCK_FIELDS * num_blocks) * 8, NUM_BLOCK_FIELDS)
            count = rows_of_next_tile(after[expert] - start, BLOCK_ROWS)
            block[0], block[1], block[2] = expert, start, count
            start += count
            num_blocks += 1
    integers(blocks, 1)[0] = num_blocks


@njit(inline="always")
def most_blocks(num_pairs, num_experts):
    """How many blocks there are at most, however pairs are distributed."""
    return min(num_experts, num_pairs) + num_pairs // BLOCK_ROWS


@njit
def take_rows(source, sources, out, first, last, size):
    """out[place] = source[sources[place]], `size` float32 each."""
    rows = integers(sources, last)
    for place in range(first, last):
        values, target = floats(source + rows[place] * size * 4, size), floats(out + place * size * 4, size)
        for i in range(size):
            target[i] = values[i]


@njit
def permute_pairs(source, owners, orders, out, first, last, size):
    """out[place, i] = source[place, order[i]] with the order of the place's expert, `size` float32 each.

    orders: int64 [num_experts], addresses of int64 [size]; 0: as it is
    """
    of_place = integers(owners, last)
    for place in range(first, last):
        values, target = floats(source + place * size * 4, size), floats(out + place * size * 4, size)
        order = integers(orders + of_place[place] * 8, 1)[0]
        if order == 0:
            for i in range(size):
                target[i] = values[i]
        else:
            indices = integers(order, size)
            for i in range(size):
                target[i] = values[indices[i]]


@njit(fastmath=_FUSED)
def add_parts_of_pairs(parts, places, weights, out, first, last, size, top_k):
    """Adds to rows of out what their experts made of them, times their shares, summed in the order of those.

    parts: float32 [pairs, size], by place, overwritten; places: int64 [rows, top_k]; weights: float32 [rows, top_k]
    """
    for row in range(first, last):
        of_row, shares = integers(places + row * top_k * 8, top_k), floats(weights + row * top_k * 4, top_k)
        total, share = floats(parts + of_row[0] * size * 4, size), shares[0]
        for i in range(size):
            total[i] = share * total[i]
        for rank in range(1, top_k):
            part, share = floats(parts + of_row[rank] * size * 4, size), shares[rank]
            for i in range(size):
                total[i] += share * part[i]
        target = floats(out + row * size * 4, size)
        for i in range(size):
            target[i] += total[i]


@njit(fastmath=_FUSED)
def add_gated_rows(x, gates, stride, out, first, last, size):
    """out += sigmoid(gate) * x, for rows of `size` float32. gates: float32 [rows, stride], of which the first counts"""
    for row in range(first, last):
        gate = floats(gates + row * stride * 4, 1)[0]
        share = np.float32(1.0) / (np.float32(1.0) + np.float32(math.exp(-gate)))
        values, target = floats(x + row * size * 4, size), floats(out + row * size * 4, size)
        for i in range(size):
            target[i] += share * values[i]


@cache
def expert_kernel():
    """The kernel of these operations: (fields, first, last, rows), some rows or pairs of one, out of so many.

    fields: address of int64 [NUM_FIELDS], which operation it is, and then the arguments of its function in order, but
    for the number of pairs and for the first and last of them
    """

    def run_operation(fields, first, last, rows):
        op = integers(fields, NUM_FIELDS)
        kind = op[0]
        if kind == ROUTE:
            route_rows(op[1], op[2], op[3], op[4], op[5], op[6], op[7], first, last)
        elif kind == ARRANGE:
            arrange_pairs(op[1], rows, op[2], op[3], op[4], op[5], op[6], op[7], op[8])
        elif kind == TAKE:
            take_rows(op[1], op[2], op[3], first, last, op[4])
        elif kind == PERMUTE:
            permute_pairs(op[1], op[2], op[3], op[4], first, last, op[5])
        elif kind == ADD_PARTS:
            add_parts_of_pairs(op[1], op[2], op[3], op[4], first, last, op[5], op[6])
        elif kind == ADD_GATED:
            add_gated_rows(op[1], op[2], op[3], op[4], first, last, op[5])

    return kernel(_SIGNATURE)(named(run_operation, "operations of experts"))


def expert_address() -> int:
    """Of the `expert_kernel`, as operations name it."""
    return address_of(expert_kernel())
