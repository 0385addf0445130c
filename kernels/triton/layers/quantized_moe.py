"""Mixtures of experts with quantised matrices: the two grouped products of `moe`, with tiles unpacked in registers.

As in `quantized.linear`, the matrix is the tensor cores' first operand; `quantized.tile` is the loop of both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.compat import next_power_of_2
from kernels.triton.configs import MoeConfig, chip_of, quantized_moe_config
from kernels.triton.layers.moe import SortedPairs, locate_tile
from kernels.triton.quantized.matrix import QuantizedMatrix
from kernels.triton.quantized.tile import STEP, Operands, multiply_tile


def mix_quantized_experts(
    x: Tensor,
    gate_up: QuantizedMatrix,
    down: QuantizedMatrix,
    weights: Tensor,
    experts: Tensor,
    *,
    config: MoeConfig | None = None,
) -> Tensor:
    """As `kernels.reference.moe.mix_experts` with the matrices that these stand for, summed in float32.

    gate_up: [num_experts * 2 * size, hidden_size], of each expert gate and up; down: [num_experts * hidden_size, size]
    config: tile sizes, of which `step` is not used; by default those for this many pairs per expert
    """
    (num_tokens, hidden_size), top_k = x.shape, experts.shape[1]
    num_experts, size, num_pairs = down.num_outputs // hidden_size, down.num_inputs, num_tokens * top_k
    assert gate_up.shape == (num_experts * 2 * size, hidden_size), f"{gate_up.shape} for {down.shape}"
    assert down.num_outputs % hidden_size == 0, f"{down.shape} for {hidden_size}"
    assert weights.shape == experts.shape == (num_tokens, top_k), f"{tuple(weights.shape)}, {tuple(experts.shape)}"
    if not num_pairs:
        return torch.empty_like(x)
    config = config or quantized_moe_config(num_pairs // num_experts, x.dtype, chip=chip_of(x.device))
    sorted_pairs = SortedPairs.of(weights, experts, num_experts)
    hidden = x.new_empty(num_pairs, size)
    parts = torch.empty(num_pairs, hidden_size, dtype=torch.float32, device=x.device)
    _multiply(x.contiguous(), gate_up, hidden, sorted_pairs, config, top_k=top_k, is_gated=True)
    _multiply(hidden, down, parts, sorted_pairs, config, top_k=top_k, is_gated=False)
    return parts.view(num_tokens, top_k, hidden_size).sum(1).to(x.dtype)


def _multiply(
    source: Tensor,
    matrix: QuantizedMatrix,
    target: Tensor,
    sorted_pairs: SortedPairs,
    config: MoeConfig,
    *,
    top_k: int,
    is_gated: bool,
) -> None:
    """One of the two products."""
    if matrix.order is not None:
        source = source.index_select(1, matrix.order)
    width, num_experts = target.shape[1], sorted_pairs.tensors[1].shape[0] - 1
    operands = Operands.of(matrix)
    quantized_experts_kernel[(sorted_pairs.num_tiles(config.rows), triton.cdiv(width, config.columns))](
        source,
        *operands.tensors,
        target,
        *sorted_pairs.tensors,
        width,
        *operands.sizes,
        **operands.constants,
        IS_FULL=width % config.columns == 0 and operands.fills_steps,
        NUM_EXPERTS=num_experts,
        PADDED_EXPERTS=next_power_of_2(num_experts),
        DEPTH=source.shape[1],
        TOP_K=top_k,
        IS_GATED=is_gated,
        ROWS=config.rows,
        COLUMNS=config.columns,
        STEP=STEP,
        STAGES=config.stages,
        num_warps=config.warps,
    )


@triton.jit
def quantized_experts_kernel(
    source_ptr,
    words_ptr,
    scales_ptr,
    offsets_ptr,
    channels_ptr,
    table_ptr,
    target_ptr,
    pairs_ptr,
    starts_ptr,
    weights_ptr,
    width,
    num_outputs,
    num_units,
    stride_block,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_CHANNELS: tl.constexpr,
    IS_FULL: tl.constexpr,
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
    # grid: [num_tiles, cdiv(width, COLUMNS)]; as `moe.grouped_kernel`, which says what is read and written
    expert, sorted_rows, end = locate_tile(starts_ptr, NUM_EXPERTS, PADDED_EXPERTS, ROWS)
    if expert >= NUM_EXPERTS:  # the grid is for the most tiles that there can be
        return
    is_row = sorted_rows < end
    pairs = tl.load(pairs_ptr + sorted_rows, mask=is_row, other=0)
    source_rows = (pairs // TOP_K if IS_GATED else sorted_rows).to(tl.int64)
    target_rows = (sorted_rows if IS_GATED else pairs).to(tl.int64)
    targets = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = targets < width
    columns = expert * (2 * width if IS_GATED else width) + targets
    sources = source_ptr + source_rows * DEPTH
    num_steps = tl.cdiv(DEPTH, STEP)
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    for part in tl.static_range(2 if IS_GATED else 1):  # gate, then up
        places = columns + part * width
        found = multiply_tile(
            sources,
            words_ptr,
            scales_ptr,
            offsets_ptr,
            table_ptr,
            is_row,
            places,
            is_column,
            num_outputs,
            DEPTH,
            num_units,
            stride_block,
            0,
            num_steps,
            BITS,
            GROUP,
            KIND,
            VALUES,
            HAS_OFFSETS,
            IS_FULL,
            DEPTH % STEP == 0,
            ROWS,
            COLUMNS,
            STEP,
            STAGES,
        )
        if HAS_CHANNELS:
            found *= tl.load(channels_ptr + places, mask=is_column, other=0.0)[:, None]
        if part == 0:
            acc = found
        else:
            acc = acc * tl.sigmoid(acc) * found
    if not IS_GATED:
        acc *= tl.load(weights_ptr + pairs, mask=is_row, other=0.0)[None, :]
    tl.store(
        target_ptr + target_rows[None, :] * width + targets[:, None],
        acc.to(target_ptr.dtype.element_ty),
        mask=is_row[None, :] & is_column[:, None],
    )
