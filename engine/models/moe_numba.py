"""A mixture of experts on a CPU: the operations that route rows, multiply pairs, and add up what comes of them.

Rows are copied to the places of their experts, where the pairs of one lie side by side: each expert's matrices are read
once for up to BLOCK_ROWS pairs, and those of experts that nobody chose are not read. Which pairs share a tile changes
nothing: a pair's numbers depend on its row alone, and shares are added in the order in which they were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.moe import Experts, Gate, SparseMLP
from engine.models.products import Products, product_scratch, rounding_of, row_bytes
from engine.quantization.linear import KeptMatrix
from kernels.numba.core.formats import FLOAT32
from kernels.numba.core.lanes import LANES
from kernels.numba.ops.experts import (
    ADD_GATED,
    ADD_PARTS,
    ARRANGE,
    NUM_BLOCK_FIELDS,
    PERMUTE,
    ROUTE,
    TAKE,
    expert_address,
    most_blocks,
)
from kernels.numba.ops.linear import product_address
from kernels.numba.packing.packing import PackedMatrix, Stack, pack
from kernels.numba.program.program import Operation, Step
from kernels.numba.program.team import operation


@dataclass(frozen=True, slots=True)
class ExpertColumns:
    """The matrices of a layer's experts that are of one format, in the same columns of what the products write.

    matrices: int64 [num_experts, 2], addresses of their values and scales; zeros for experts of another format
    orders: int64 [num_experts], addresses of the order of each one's inputs, zeros for their own; None: all have that
    """

    kind: int
    first: int
    num_panels: int
    matrices: Tensor
    orders: Tensor | None


def columns_of_experts(stack: Stack, num_experts: int, sizes: Sequence[int]) -> list[ExpertColumns]:
    """sizes: rows of each expert's matrices, which lie one on top of the other. One set of columns where an expert's
    matrices lie side by side in memory, as nearly always; else one for each matrix, and for each format that some have.
    """
    total = sum(sizes)
    whole = [_locate(stack, expert * total, total) for expert in range(num_experts)]
    if all(place is not None for place in whole):
        return _by_format([place for place in whole if place is not None], 0, total)
    found, first = [], 0
    for size in sizes:
        places = [_locate(stack, expert * total + first, size) for expert in range(num_experts)]
        some = [place for place in places if place is not None]
        assert len(some) == num_experts, "a checkpoint's matrix is packed in one piece"
        found += _by_format(some, first, size)
        first += size
    return found


_Place = tuple[PackedMatrix, int]  # and the first of its panels


def _locate(stack: Stack, start: int, size: int) -> _Place | None:
    """Where some rows are, if one part has them all."""
    first = 0
    for part in stack.parts:
        if first <= start < first + part.num_rows:
            return (part, (start - first) // LANES) if start + size <= first + part.num_rows else None
        first += part.num_rows
    return None


def _by_format(places: list[_Place], first: int, size: int) -> list[ExpertColumns]:
    found = []
    for kind in dict.fromkeys(part.kind for part, _ in places):
        matrices, orders = torch.zeros(len(places), 2, dtype=torch.int64), torch.zeros(len(places), dtype=torch.int64)
        for expert, (part, panel) in enumerate(places):
            if part.kind == kind:
                parts = torch.tensor([_address(tensor, panel) for tensor in (part.values, part.scales)])
                matrices[expert] = parts
                orders[expert] = 0 if part.order is None else part.order.data_ptr()
        found.append(ExpertColumns(kind, first, size // LANES, matrices, orders if bool(orders.any()) else None))
    return found


def _address(tensor: Tensor, panel: int) -> int:
    """Of a panel; 0 where there is nothing."""
    return tensor.data_ptr() + panel * tensor.stride(0) * tensor.itemsize if tensor.numel() else 0


class ExpertProgram:
    """The operations of a model's mixtures, and the buffers that they share, for up to `num_rows` rows.

    `Step.PAIRS` says how many pairs there are: `top_k` of each row.
    """

    def __init__(self, mixtures: Sequence[SparseMLP], num_rows: int, products: Products) -> None:
        (self.top_k,) = {one.mixture.top_k for one in mixtures}
        self._products = products
        self._keeps: list[object] = []  # owners of the memory whose addresses are in the operations
        num_experts = max(one.mixture.num_experts for one in mixtures)
        stacks = [_stack(matrix) for one in mixtures for matrix in (one.experts.gate_up_proj, one.experts.down_proj)]
        width, hidden_size = stacks[1].depth, stacks[0].depth
        num_pairs = num_rows * self.top_k
        self._logits = torch.empty(num_rows, -(-num_experts // LANES) * LANES)
        self._gates = torch.empty(num_rows, LANES)
        self._weights = torch.empty(num_rows, self.top_k)
        self._experts, self._places, self._sources, self._owners = (
            torch.zeros(num_pairs, dtype=torch.int64) for _ in range(4)
        )
        self._ends = torch.zeros(num_experts, dtype=torch.int64)
        self._blocks = torch.zeros(1 + NUM_BLOCK_FIELDS * most_blocks(num_pairs, num_experts), dtype=torch.int64)
        self._parts = torch.empty(num_pairs, hidden_size)  # of rows, then of what experts made of them
        self._gate_up = torch.empty(num_pairs, 2 * width)
        self._activated = torch.empty(num_pairs, width)
        self._scratch = product_scratch(num_pairs, max(hidden_size, width), stacks)

    def add_mixture(self, mlp: SparseMLP, x: Tensor, out: Tensor) -> list[list[int]]:
        """out += the weighted sum of each row's experts. x, out: float32 [rows, hidden_size]"""
        mixture, experts = mlp.mixture, mlp.experts
        size = mixture.intermediate_size
        of_pairs = [tensor.data_ptr() for tensor in (self._places, self._sources, self._owners, self._blocks)]
        route = (
            self._logits.data_ptr(), self._logits.shape[1], mixture.num_experts, self.top_k, int(mixture.normalises),
            self._weights.data_ptr(), self._experts.data_ptr(),
        )  # fmt: skip
        arrange = (self._experts.data_ptr(), self.top_k, mixture.num_experts, self._ends.data_ptr(), *of_pairs)
        take = (x.data_ptr(), self._sources.data_ptr(), self._parts.data_ptr(), x.shape[1])
        silu = (self._gate_up.data_ptr(), self._activated.data_ptr(), size)
        add = (self._parts.data_ptr(), self._places.data_ptr(), self._weights.data_ptr(), out.data_ptr(), x.shape[1])
        return [
            *self._multiply_gate(mlp.gate, x, self._logits),
            _of_experts(ROUTE, *route),
            _of_experts(ARRANGE, *arrange, rows=Step.PAIRS),
            _of_experts(TAKE, *take, rows=Step.PAIRS),
            *self._multiply(self._parts, experts, experts.gate_up_proj, (size, size), self._gate_up),
            operation(Operation.SILU_AND_MULTIPLY, *silu, rows=Step.PAIRS),
            *self._multiply(self._activated, experts, experts.down_proj, (x.shape[1],), self._parts),
            _of_experts(ADD_PARTS, *add, self.top_k),
        ]

    def add_shared(self, mlp: SparseMLP, x: Tensor, shared: Tensor, out: Tensor) -> list[list[int]]:
        """out += sigmoid(the shared expert's gate) * what that made of the rows."""
        assert mlp.shared_expert_gate is not None
        where = (shared.data_ptr(), self._gates.data_ptr(), LANES, out.data_ptr(), out.shape[1])
        return [*self._multiply_gate(mlp.shared_expert_gate, x, self._gates), _of_experts(ADD_GATED, *where)]

    def _multiply_gate(self, gate: Gate, x: Tensor, out: Tensor) -> list[list[int]]:
        matrix = Stack((pack(gate.weight.detach().float(), FLOAT32),))
        self._keeps.append(matrix)
        multiplied: list[list[int]] = self._products.operations(x, matrix, out, self._scratch, adds=False)
        return multiplied

    def _multiply(
        self, x: Tensor, experts: Experts, matrix: KeptMatrix, sizes: Sequence[int], out: Tensor
    ) -> list[list[int]]:
        """out = of each pair, the product of its row of x with the matrices of its expert."""
        operations: list[list[int]] = []
        taken: tuple[Operation | None, Tensor | None] | None = None  # what the rows became: they may stay so
        source = factors = 0
        depth, of_pairs, stack = x.shape[1], Step.PAIRS, _stack(matrix)
        self._keeps.append(stack)
        for columns in columns_of_experts(stack, experts.num_experts, sizes):
            self._keeps.append(columns)
            kind = self._products.kind_with(columns.kind)
            wanted = rounding_of(kind), columns.orders
            if taken is None or taken[0] != wanted[0] or taken[1] is not wanted[1]:
                taken = wanted
                reorder = [] if columns.orders is None else [self._permute(x, columns.orders)]
                made, source, factors = self._products.rounded(reorder, x, wanted[0], self._scratch, rows=of_pairs)
                operations += made
            where = (columns.matrices.data_ptr(), self._blocks.data_ptr(), columns.num_panels)
            target = (out.data_ptr() + 4 * columns.first, out.shape[1], 0)
            sizes_of_pair = (*row_bytes(kind, depth), experts.num_experts)
            operations.append(
                operation(
                    Operation.MULTIPLY_EXPERTS, product_address(kind), source, factors, depth, *where,
                    self._products.panels_at_once(columns.num_panels), *target, *sizes_of_pair, rows=of_pairs,
                )
            )  # fmt: skip
        return operations

    def _permute(self, x: Tensor, orders: Tensor) -> list[int]:
        fields = (x.data_ptr(), self._owners.data_ptr(), orders.data_ptr(), self._scratch.ordered.data_ptr())
        return _of_experts(PERMUTE, *fields, x.shape[1], rows=Step.PAIRS)


def _of_experts(kind: int, *fields: int, rows: Step = Step.ROWS) -> list[int]:
    made: list[int] = operation(Operation.OF_EXPERTS, expert_address(), kind, *fields, rows=rows)
    return made


def _stack(matrix: KeptMatrix) -> Stack:
    assert isinstance(matrix.weight, Stack), "compiled layers pack the matrices of experts"
    return matrix.weight
