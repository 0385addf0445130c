"""The operations of a mixture of experts against the definition, and the experts of rows whose router is in doubt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.numba.ops.experts import (
    ADD_GATED,
    ADD_PARTS,
    ARRANGE,
    NUM_BLOCK_FIELDS,
    PERMUTE,
    ROUTE,
    expert_address,
    most_blocks,
)
from kernels.numba.ops.linear import BLOCK_ROWS
from kernels.numba.program.program import NUM_FIELDS, NUM_STEP_FIELDS, Operation, Step, count_units
from kernels.numba.program.team import operation
from kernels.reference.moe import route


def op_of_experts(kind: int, *fields: int | Tensor, rows: Step = Step.ROWS) -> list[int]:
    numbers = [field.data_ptr() if isinstance(field, Tensor) else field for field in fields]
    return operation(Operation.OF_EXPERTS, expert_address(), kind, *numbers, rows=rows)


class Routed:
    """Rows sent to experts, and the pairs in the order of those."""

    def __init__(self, execute, logits: Tensor, *, top_k: int, normalise: bool, num_threads: int = 1) -> None:
        (num_rows, num_experts), num_pairs = logits.shape, logits.shape[0] * top_k
        self.weights, self.experts = torch.empty(num_rows, top_k), torch.zeros(num_rows, top_k, dtype=torch.int64)
        padded = torch.full((num_rows, -(-num_experts // 16) * 16), 1e9)  # of columns that fill up a panel
        padded[:, :num_experts] = logits
        self.places, self.sources, self.owners = (torch.full((num_pairs,), -1, dtype=torch.int64) for _ in range(3))
        ends = torch.zeros(num_experts, dtype=torch.int64)
        most = most_blocks(num_pairs, num_experts)
        blocks = torch.full((1 + NUM_BLOCK_FIELDS * most,), -1, dtype=torch.int64)
        sizes = (padded.shape[1], num_experts, top_k, int(normalise))
        of_pairs = (self.places, self.sources, self.owners, blocks)
        execute(
            [
                op_of_experts(ROUTE, padded, *sizes, self.weights, self.experts),
                op_of_experts(ARRANGE, self.experts, top_k, num_experts, ends, *of_pairs, rows=Step.PAIRS),
            ],
            num_rows=num_rows,
            num_threads=num_threads,
            numbers={Step.PAIRS: num_pairs},
        )
        self.blocks = blocks[1:].view(-1, NUM_BLOCK_FIELDS)[: int(blocks[0])].tolist()


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (5, 5), (60, 4), (128, 8), (17, 1)])
def test_rows_go_to_the_experts_of_the_definition(execute, num_experts: int, top_k: int, normalise: bool) -> None:
    logits = torch.randn(33, num_experts) * 3
    logits[5] = 0.0  # of equal ones, those with the lowest numbers
    logits[6, ::2] = 1.0
    found = Routed(execute, logits, top_k=top_k, normalise=normalise)
    weights, experts = route(logits, top_k, normalise=normalise)
    assert torch.equal(found.experts, experts)
    torch.testing.assert_close(found.weights, weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_experts_are_different_ones_whatever_the_router_says(execute, poison: float) -> None:
    logits = torch.randn(9, 12)
    logits[2], logits[4, 7], logits[7, :3] = poison, poison, poison
    clean = Routed(execute, logits.nan_to_num(0.0, 0.0, 0.0), top_k=5, normalise=True)
    found = Routed(execute, logits, top_k=5, normalise=True)
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 12 for row in found.experts.tolist())
    others = [0, 1, 3, 5, 6, 8]
    assert torch.equal(found.weights[others], clean.weights[others])
    assert not found.weights[2].isfinite().any()


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("num_rows", [1, 7, 300])
def test_pairs_lie_side_by_side_in_the_order_of_their_numbers(execute, num_rows: int, num_threads: int) -> None:
    logits = torch.randn(num_rows, 6)
    logits[:, 3] += 5.0  # which all want
    found = Routed(execute, logits, top_k=2, normalise=True, num_threads=num_threads)
    pairs = found.experts.flatten().argsort(stable=True)
    assert torch.equal(found.places[pairs], torch.arange(2 * num_rows))
    assert torch.equal(found.sources, pairs // 2)
    assert torch.equal(found.owners, found.experts.flatten()[pairs])
    covered = []
    for expert, first, count in found.blocks:
        assert 0 < count <= BLOCK_ROWS
        assert set(found.owners[first : first + count].tolist()) == {expert}
        covered += range(first, first + count)
    assert covered == list(range(2 * num_rows))


def test_parts_are_added_in_the_order_of_their_shares(execute) -> None:
    num_rows, top_k, size = 9, 3, 48
    parts, out = torch.randn(num_rows * top_k, size), torch.randn(num_rows, size)
    places, weights = torch.randperm(num_rows * top_k).view(num_rows, top_k), torch.rand(num_rows, top_k)
    expected = out.double() + (parts[places].double() * weights[..., None].double()).sum(1)
    found, own = out.clone(), parts.clone()
    execute([op_of_experts(ADD_PARTS, own, places, weights, found, size, top_k)], num_rows=num_rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gates, x = torch.randn(num_rows, 16), torch.randn(num_rows, size)
    found = out.clone()
    execute([op_of_experts(ADD_GATED, x, gates, 16, found, size)], num_rows=num_rows)
    torch.testing.assert_close(found, out + gates[:, :1].sigmoid() * x, rtol=1e-5, atol=1e-5)


def test_rows_of_pairs_come_in_the_order_of_their_expert(execute) -> None:
    x, owners = torch.randn(10, 32), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
    orders = [torch.randperm(32), None, torch.randperm(32)]
    addresses = torch.tensor([0 if order is None else order.data_ptr() for order in orders])
    out = torch.empty(10, 32)
    fields = {Step.PAIRS: 10}
    execute([op_of_experts(PERMUTE, x, owners, addresses, out, 32, rows=Step.PAIRS)], num_rows=0, numbers=fields)
    for row, owner in enumerate(owners.tolist()):
        order = orders[owner]
        assert torch.equal(out[row], x[row] if order is None else x[row, order])


def test_one_part_of_a_row_is_normalised_in_place(execute, op) -> None:
    x, weight = torch.randn(9, 80), torch.randn(48)
    expected = x.clone()
    part = x[:, 16:64].double()
    expected[:, 16:64] = (part * (part.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.double()).float()
    found = x.clone()
    execute([op(Operation.NORMALISE_PARTS, found.data_ptr() + 64, weight, 48, 80, factors=(1e-5, 0.0))], num_rows=9)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[:, :16], x[:, :16])
    assert torch.equal(found[:, 64:], x[:, 64:])


@pytest.mark.parametrize("kind", list(Operation))
def test_units_are_counted_without_what_other_operations_write(kind: Operation) -> None:
    """A thread that was descheduled counts when the others are beyond, in a layer that uses the same buffers again."""
    step = np.arange(1, 1 + NUM_STEP_FIELDS)
    fields = np.full(NUM_FIELDS, -1)  # as an address, it may not be read
    fields[0], fields[4], fields[7], fields[8], fields[14], fields[NUM_FIELDS - 2] = kind, 3, 6, 2, 8, Step.PAIRS
    assert count_units(fields, step) > 0
