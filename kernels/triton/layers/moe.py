"""Mixtures of experts as two grouped matrix products (GEMMs).

A *pair* is a token and one of its experts. Pairs are sorted by expert, the rows of an expert are divided into tiles,
and each program looks up on the device which expert its tile belongs to: no size depends on the routing, as CUDA graphs
need it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.compat import dot, next_power_of_2
from kernels.triton.configs import MoeConfig, chip_of, moe_config


def route(router_logits: Tensor, top_k: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """As `kernels.reference.moe.route`."""
    num_tokens, num_experts = router_logits.shape
    assert router_logits.stride(1) == 1, "rows are contiguous"
    assert top_k <= num_experts, f"{top_k} of {num_experts} experts"
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=router_logits.device)
    experts = torch.empty(num_tokens, top_k, dtype=torch.int64, device=router_logits.device)
    if num_tokens:
        route_kernel[(num_tokens,)](
            router_logits,
            weights,
            experts,
            router_logits.stride(0),
            NUM_EXPERTS=num_experts,
            PADDED=next_power_of_2(num_experts),
            TOP_K=top_k,
            PADDED_K=next_power_of_2(top_k),
            NORMALISE=normalise,
            num_warps=1,
        )
    return weights, experts


class SortedPairs(NamedTuple):
    """The pairs of a batch in the order of their experts.

    tensors: their numbers, token * top_k + rank, [pairs]; where each expert's begin, and the last one's end, [experts +
    1]; their shares by number, [tokens, top_k]
    """

    tensors: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, weights: Tensor, experts: Tensor, num_experts: int) -> SortedPairs:
        """weights, experts: [tokens, top_k], of `route`"""
        owners, pairs = experts.flatten().sort(stable=True)
        starts = torch.searchsorted(owners, torch.arange(num_experts + 1, device=experts.device))
        return cls((pairs, starts, weights.contiguous()))

    def num_tiles(self, num_rows: int) -> int:
        """Of so many pairs each, at most: each expert may have one partial tile."""
        num_pairs, num_experts = self.tensors[0].shape[0], self.tensors[1].shape[0] - 1
        tiles: int = triton.cdiv(num_pairs, num_rows)
        return tiles + min(num_experts, num_pairs)


def mix_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    *,
    config: MoeConfig | None = None,
) -> Tensor:
    """As `kernels.reference.moe.mix_experts`.

    config: tile sizes; by default those for this many pairs per expert
    """
    (num_tokens, hidden_size), (num_experts, double_size, _), top_k = x.shape, gate_up.shape, experts.shape[1]
    size, num_pairs = double_size // 2, num_tokens * top_k
    assert gate_up.shape == (num_experts, 2 * size, hidden_size), f"{tuple(gate_up.shape)} for {hidden_size}"
    assert down.shape == (num_experts, hidden_size, size), f"{tuple(down.shape)} for {tuple(gate_up.shape)}"
    assert weights.shape == experts.shape == (num_tokens, top_k), f"{tuple(weights.shape)}, {tuple(experts.shape)}"
    assert x.stride(1) == gate_up.stride(2) == down.stride(2) == 1, "rows are contiguous"
    if not num_pairs:
        return torch.empty_like(x)
    config = config or moe_config(num_pairs // num_experts, x.dtype, chip=chip_of(x.device))
    sorted_pairs = SortedPairs.of(weights, experts, num_experts)
    hidden = x.new_empty(num_pairs, size)
    parts = torch.empty(num_pairs, hidden_size, dtype=torch.float32, device=x.device)
    num_tiles = sorted_pairs.num_tiles(config.rows)
    products = ((x, gate_up, hidden, size), (hidden, down, parts, hidden_size))
    for source, matrix, target, width in products:
        grouped_kernel[(num_tiles, triton.cdiv(width, config.columns))](
            source,
            matrix,
            target,
            *sorted_pairs.tensors,
            width,
            source.stride(0),
            *matrix.stride()[:2],
            target.stride(0),
            NUM_EXPERTS=num_experts,
            PADDED_EXPERTS=next_power_of_2(num_experts),
            DEPTH=source.shape[1],
            TOP_K=top_k,
            IS_GATED=matrix is gate_up,
            ROWS=config.rows,
            COLUMNS=config.columns,
            STEP=config.step,
            STAGES=config.stages,
            num_warps=config.warps,
        )
    return parts.view(num_tokens, top_k, hidden_size).sum(1).to(x.dtype)


@triton.jit
def route_kernel(
    logits_ptr,
    weights_ptr,
    experts_ptr,
    stride_token,
    NUM_EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    # grid: [num_tokens]; one program routes one token: TOP_K times, the largest share that is left
    token = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, PADDED)
    logits = tl.load(logits_ptr + token * stride_token + numbers, mask=numbers < NUM_EXPERTS, other=float("-inf"))
    logits = logits.to(tl.float32)
    shares = tl.exp(logits - tl.max(logits, 0))
    shares = shares / tl.sum(shares, 0)
    shares = tl.where(numbers < NUM_EXPERTS, shares, -1.0)
    ranks = tl.arange(0, PADDED_K)
    weights = tl.zeros([PADDED_K], tl.float32)
    experts = tl.zeros([PADDED_K], tl.int32)
    for rank in tl.static_range(TOP_K):
        largest = tl.max(shares, 0)
        expert = tl.min(tl.where(shares == largest, numbers, PADDED), 0)
        weights = tl.where(ranks == rank, largest, weights)
        experts = tl.where(ranks == rank, expert, experts)
        shares = tl.where(numbers == expert, -1.0, shares)
    if NORMALISE:
        weights = weights / tl.sum(weights, 0)
    tl.store(weights_ptr + token * TOP_K + ranks, weights, mask=ranks < TOP_K)
    tl.store(experts_ptr + token * TOP_K + ranks, experts.to(tl.int64), mask=ranks < TOP_K)


@triton.jit
def locate_tile(starts_ptr, NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """(the expert of this program's tile, or NUM_EXPERTS; its rows in the experts' order; where that expert ends)"""
    numbers = tl.arange(0, PADDED_EXPERTS)
    is_expert = numbers < NUM_EXPERTS
    starts = tl.load(starts_ptr + numbers, mask=is_expert, other=0).to(tl.int32)
    ends = tl.load(starts_ptr + numbers + 1, mask=is_expert, other=0).to(tl.int32)
    tiles = tl.cdiv(ends - starts, ROWS)
    last_tiles = tl.cumsum(tiles, 0)
    expert = tl.sum((is_expert & (last_tiles <= tl.program_id(0))).to(tl.int32), 0)
    is_mine = numbers == expert
    tile = tl.program_id(0) - tl.sum(tl.where(is_mine, last_tiles - tiles, 0), 0)
    end = tl.sum(tl.where(is_mine, ends, 0), 0)
    sorted_rows = tl.sum(tl.where(is_mine, starts, 0), 0) + tile * ROWS + tl.arange(0, ROWS)
    return expert, sorted_rows, end


@triton.jit
def grouped_kernel(
    source_ptr,
    matrix_ptr,
    target_ptr,
    pairs_ptr,
    starts_ptr,
    weights_ptr,
    width,
    stride_source,
    stride_expert,
    stride_column,
    stride_target,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    IS_GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    # grid: [num_tiles, cdiv(width, COLUMNS)]; one program multiplies a tile of an expert's pairs by COLUMNS columns
    #   gated:  rows of x, by pair      -> silu(gate) * up, in the order of the experts
    #   else:   in the experts' order   -> weighted, by pair
    expert, sorted_rows, end = locate_tile(starts_ptr, NUM_EXPERTS, PADDED_EXPERTS, ROWS)
    if expert >= NUM_EXPERTS:  # the grid is for the most tiles that there can be
        return
    is_row = sorted_rows < end
    pairs = tl.load(pairs_ptr + sorted_rows, mask=is_row, other=0)
    source_rows = (pairs // TOP_K if IS_GATED else sorted_rows).to(tl.int64)
    target_rows = (sorted_rows if IS_GATED else pairs).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < width

    steps = tl.arange(0, STEP)
    sources = source_ptr + source_rows[:, None] * stride_source + steps[None, :]
    matrices = matrix_ptr + expert.to(tl.int64) * stride_expert
    matrices += columns.to(tl.int64)[:, None] * stride_column + steps[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    up_acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, DEPTH, STEP, num_stages=STAGES):
        is_step = (start + steps < DEPTH)[None, :]
        a = tl.load(sources + start, mask=is_row[:, None] & is_step, other=0.0)
        is_element = is_column[:, None] & is_step
        acc = dot(a, tl.trans(tl.load(matrices + start, mask=is_element, other=0.0)), acc)
        if IS_GATED:
            up = tl.load(matrices + width.to(tl.int64) * stride_column + start, mask=is_element, other=0.0)
            up_acc = dot(a, tl.trans(up), up_acc)
    if IS_GATED:
        acc = acc * tl.sigmoid(acc) * up_acc
    else:
        acc *= tl.load(weights_ptr + pairs, mask=is_row, other=0.0)[:, None]
    targets = target_ptr + target_rows[:, None] * stride_target + columns[None, :]
    tl.store(targets, acc.to(target_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
