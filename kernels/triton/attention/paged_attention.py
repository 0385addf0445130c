"""Paged attention for any mix of prompt chunks, decoding and drafts in one call.

Online softmax over tiles of the context (Dao et al. 2022, "FlashAttention"), in powers of two. A tile's rows are its
queries times the query heads that share a KV head, so that keys and values are read once for all of these (Ainslie et
al. 2023, "GQA"). With few new tokens, a context is split over programs (Dao et al. 2023, "Flash-Decoding").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.triton.attention.prompt_kernel import prompt_kernel
from kernels.triton.attention.split_kernel import combine_kernel, split_kernel
from kernels.triton.attention.work_partition import SplitChunk, WorkPartition, Workspace, partition_attention
from kernels.triton.compat import next_power_of_2
from kernels.triton.configs import AttentionConfig, attention_config, chip_of
from kernels.triton.kv_codes import check_scales


@dataclass(frozen=True, slots=True)
class Prepared:
    """What calls with the same lengths and geometry share: made once per step instead of in each layer."""

    partition: WorkPartition
    config: AttentionConfig
    workspace: Workspace
    tree_words: Tensor | None = None  # of `pack_tree`


def pack_tree(tree_mask: Tensor) -> Tensor:
    """The tree mask in bits. [num_tokens, cdiv(width, 32)] int32; bit j % 32 of word j // 32 is column j."""
    padded: Tensor = torch.nn.functional.pad(tree_mask, (0, -tree_mask.shape[1] % 32)).unflatten(1, (-1, 32))
    bits = torch.arange(32, dtype=torch.int32, device=tree_mask.device)
    return (padded.to(torch.int32) << bits).sum(-1, dtype=torch.int32)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    tree_mask: Tensor | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    prepared: Prepared | None = None,
) -> Tensor:
    """As `kernels.reference.attention.paged_attention`, with scores and sums in float32.

    A sequence's result has the same bits whatever else is in the batch. A sequence of length 0 (the padding of a CUDA
    graph) is skipped: its rows of the result are not written.

    prepared: the step's partition of the work; without it, the lengths are copied to the host, which waits for them
    """
    _check(q, k_cache, v_cache, block_tables, query_starts, seq_lens)
    check_scales(k_cache, v_cache, k_scales, v_scales)
    if prepared is None:
        prepared = _prepare(q, query_starts, seq_lens, k_cache)
    words = None
    if tree_mask is not None:
        words = pack_tree(tree_mask) if prepared.tree_words is None else prepared.tree_words
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    inputs = (q, k_cache, v_cache, out, block_tables, query_starts, seq_lens)
    call = _Call(inputs, words, positions, sinks, k_scales, v_scales, scale, window, soft_cap)
    partition = prepared.partition
    if len(partition.prompt_tiles):
        _start_prompts(call, prepared)
    for chunk in partition.split_chunks:
        partials = prepared.workspace.partials(chunk.num_partials, q.shape[1], q.shape[2])
        _start_splits(call, prepared.config, chunk, partials)
        if partition.has_partials:
            _start_combine(call, prepared.config, chunk, partials)
    return out


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one call that the three kernels share."""

    inputs: tuple[Tensor, ...]  # q, k_cache, v_cache, out, block_tables, query_starts, seq_lens
    tree_words: Tensor | None
    positions: Tensor | None
    sinks: Tensor | None
    k_scales: Tensor | None
    v_scales: Tensor | None
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        options = (self.tree_words, self.positions, self.sinks, self.k_scales, self.v_scales)
        return *self.inputs, *map(self.pointer, options)

    def pointer(self, option: Tensor | None) -> Tensor:
        """Of an option that is None, some pointer, which the kernel does not read."""
        return self.inputs[5] if option is None else option

    @property
    def numbers(self) -> tuple[float, int, float]:
        return self.scale, self.window or 0, self.soft_cap or 0.0

    @property
    def strides(self) -> tuple[int, ...]:
        q, k_cache, _, out, block_tables, _, _ = self.inputs
        rows = (*q.stride()[:2], *out.stride()[:2], *k_cache.stride()[:3])
        return *rows, block_tables.stride(0), 0 if self.tree_words is None else self.tree_words.stride(0)

    @property
    def group(self) -> int:
        return self.inputs[0].shape[1] // self.inputs[1].shape[1]

    @property
    def features(self) -> dict[str, bool]:
        return {
            "HAS_WINDOW": self.window is not None,
            "HAS_TREE": self.tree_words is not None,
            "HAS_SINKS": self.sinks is not None,
        }

    @property
    def constants(self) -> dict[str, int]:
        """The compile-time constants that the prompt kernel and the split kernel share."""
        q, k_cache = self.inputs[:2]
        has_depths = self.tree_words is not None and self.window is not None and self.positions is not None
        return {
            "GROUP": self.group,
            "HEAD_DIM": q.shape[2],
            "PADDED_DIM": _padded(q.shape[2]),
            "BLOCK_SIZE": k_cache.shape[2],
            "HAS_SOFT_CAP": self.soft_cap is not None,
            "HAS_DEPTHS": has_depths,
            "HAS_SCALES": self.k_scales is not None,
            **self.features,
        }


def _start_prompts(call: _Call, prepared: Prepared) -> None:
    tiles, config = prepared.partition.prompt_tiles, prepared.config
    prompt_kernel[(len(tiles), call.inputs[1].shape[1])](
        *call.pointers,
        tiles,
        *call.numbers,
        *call.strides,
        **call.constants,
        NUM_ROWS=config.prompt_rows,
        NUM_KEYS=config.prompt_keys,
        STAGES=config.prompt_stages,
        num_warps=config.prompt_warps,
    )


def _start_splits(call: _Call, config: AttentionConfig, chunk: SplitChunk, partials: tuple[Tensor, Tensor]) -> None:
    values, sums = partials
    split_kernel[(len(chunk.tiles), call.inputs[1].shape[1], chunk.num_programs)](
        *call.pointers,
        chunk.tiles,
        chunk.partial_starts,
        values,
        sums,
        *call.numbers,
        *call.strides,
        **call.constants,
        NUM_HEADS=values.shape[1],
        NUM_ROWS=config.decode_rows,
        NUM_KEYS=config.decode_keys,
        SPLIT_SIZE=config.split_size,
        STAGES=config.decode_stages,
        num_warps=config.decode_warps,
    )


def _start_combine(call: _Call, config: AttentionConfig, chunk: SplitChunk, partials: tuple[Tensor, Tensor]) -> None:
    values, sums = partials
    _, num_heads, head_dim = values.shape
    _, _, _, out, _, query_starts, seq_lens = call.inputs
    combine_kernel[(len(chunk.queries), num_heads)](
        values,
        sums,
        out,
        query_starts,
        seq_lens,
        call.pointer(call.sinks),
        chunk.queries,
        chunk.partial_starts,
        call.window or 0,
        *out.stride()[:2],
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=_padded(head_dim),
        QUERIES_PER_TILE=config.decode_rows // call.group,
        SPLIT_SIZE=config.split_size,
        SPLITS_AT_ONCE=16,
        **call.features,
        num_warps=4,
    )


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, query_starts: Tensor, seq_lens: Tensor
) -> None:
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[1]
    assert k_cache.shape == v_cache.shape, f"caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
    assert k_cache.shape[3] == q.shape[2], f"heads of {q.shape[2]} over a cache of {k_cache.shape[3]}"
    assert num_heads % num_kv_heads == 0, f"{num_heads} heads do not share {num_kv_heads} KV heads evenly"
    assert query_starts.shape[0] == seq_lens.shape[0] + 1 == block_tables.shape[0] + 1, "one entry per sequence"
    assert q.stride(2) == k_cache.stride(3) == block_tables.stride(1) == 1, "the last dimension is contiguous"
    assert k_cache.stride() == v_cache.stride(), "keys and values lie alike"


def _padded(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


def _prepare(q: Tensor, query_starts: Tensor, seq_lens: Tensor, k_cache: Tensor) -> Prepared:
    num_kv_heads, has_codes = k_cache.shape[1], k_cache.element_size() == 1
    group = q.shape[1] // num_kv_heads
    config = attention_config(q.shape[2], group, q.dtype, chip=chip_of(q.device), has_codes=has_codes)
    partition = partition_attention(
        query_starts.diff().cpu().numpy(),
        seq_lens.cpu().numpy(),
        group=group,
        num_kv_heads=num_kv_heads,
        config=config,
        device=q.device,
    )
    return Prepared(partition, config, Workspace(0, 0, q.device))
