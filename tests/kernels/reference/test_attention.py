"""The definition of paged attention against attention written out for one row at a time."""

import math

import pytest
import torch
from torch import Tensor

from kernels.reference.attention import paged_attention, store_kv, visible


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def attend_one_row(q: Tensor, k: Tensor, v: Tensor, scale: float, soft_cap: float | None, sink: float | None) -> Tensor:
    """q: [head_dim]; k, v: [the tokens it sees, head_dim]"""
    scores = [scale * float(q @ key) for key in k]
    if soft_cap is not None:
        scores = [soft_cap * math.tanh(score / soft_cap) for score in scores]
    weights = [math.exp(score) for score in scores]
    total = sum(weights) + (0.0 if sink is None else math.exp(sink))
    return sum((weight / total * value for weight, value in zip(weights, v, strict=True)), torch.zeros_like(q))


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_every_row_attends_to_what_came_before_it(window: int | None, soft_cap: float | None, has_sinks: bool) -> None:
    num_heads, num_kv_heads, head_dim, block_size = 4, 2, 8, 4
    seq_lens, num_queries = [9, 1, 6], [3, 1, 6]
    tables = torch.tensor([[7, 2, 5], [0, 0, 0], [3, 6, 0]])
    sinks = torch.randn(num_heads, dtype=torch.float64) if has_sinks else None
    shape = (8, num_kv_heads, block_size, head_dim)
    k_cache, v_cache = (torch.full(shape, math.nan, dtype=torch.float64) for _ in range(2))
    contexts = []
    for table, length in zip(tables, seq_lens, strict=True):
        k, v = torch.randn(2, length, num_kv_heads, head_dim, dtype=torch.float64)
        position = torch.arange(length)
        store_kv(k, v, k_cache, v_cache, table[position // block_size] * block_size + position % block_size)
        contexts.append((k, v))
    q = torch.randn(sum(num_queries), num_heads, head_dim, dtype=torch.float64)
    starts = torch.tensor([0, 3, 4, 10])
    out = paged_attention(
        q, k_cache, v_cache, tables, starts, torch.tensor(seq_lens), 0.3, window=window, soft_cap=soft_cap, sinks=sinks
    )
    for b, (k, v) in enumerate(contexts):
        for row in range(int(starts[b]), int(starts[b + 1])):
            end = seq_lens[b] - num_queries[b] + row - int(starts[b]) + 1
            start = 0 if window is None else max(0, end - window)
            for head in range(num_heads):
                keys, values = (x[start:end, head // 2] for x in (k, v))
                sink = None if sinks is None else float(sinks[head])
                expected = attend_one_row(q[row, head], keys, values, 0.3, soft_cap, sink)
                torch.testing.assert_close(out[row, head], expected)


def test_a_draft_sees_the_context_and_its_own_ancestors() -> None:
    # one verified token, then drafts 0 and 1 after it, and draft 2 after draft 0
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    seen = visible(4, 6, None, tree)
    assert seen.int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 1, 0, 1],
    ]


def test_a_window_counts_a_drafts_depth_not_its_place_among_the_drafts() -> None:
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    seen = visible(4, 6, 2, tree, torch.tensor([2, 3, 3, 4]))
    assert seen.int().tolist() == [
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 0, 1, 0],
        [0, 0, 0, 1, 0, 1],
    ]
