"""The CPU back end against the definition in float64, on the batches that an engine makes."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import psutil
import pytest
import torch
from torch import Tensor

from engine.attention.torch_backend import TorchAttention
from engine.attention.torch_plan import MAX_GROUPED_QUERIES, rounded_context
from engine.batch.forward_batch import build_forward_batch
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache
from kernels.reference.attention import paged_attention
from tests.support import attention_batches

Item, scheduled, released = attention_batches.Item, attention_batches.scheduled, attention_batches.released
NUM_BLOCKS = 160


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


class Case:
    """A cache that holds NaN wherever no sequence has a token, and a batch over it."""

    def __init__(self, layer: AttentionLayer, items: list[Item], *, block_size: int, dtype: torch.dtype) -> None:
        self.layer, self.items, self.block_size, self.dtype = layer, items, block_size, dtype
        shape = (layer.num_kv_heads, layer.head_dim)
        self.k = [torch.randn(item.num_computed + item.num_new, *shape).to(dtype) for item in items]
        self.v = [torch.randn(item.num_computed + item.num_new, *shape).to(dtype) for item in items]
        self.q = [torch.randn(item.num_new, layer.num_heads, layer.head_dim).to(dtype) for item in items]

    def run(self, chosen: list[int], *, shuffle: int = 0) -> tuple[list[Tensor], Tensor]:
        """Runs the chosen sequences as one batch. Returns each one's rows, and the oracle's for the whole batch."""
        cache = KVCache([self.layer], num_blocks=NUM_BLOCKS, block_size=self.block_size, dtype=self.dtype)
        cache.kv[0].fill_(math.nan)
        blocks = list(range(NUM_BLOCKS))
        random.Random(shuffle).shuffle(blocks)
        plan = []
        for i in chosen:
            item = self.items[i]
            num_blocks = -(-(item.num_computed + item.num_new) // self.block_size)
            table, blocks = blocks[:num_blocks], blocks[num_blocks:]
            position = torch.arange(item.num_computed)
            slots = torch.tensor(table)[position // self.block_size] * self.block_size + position % self.block_size
            cache.k[0].flatten(1, 2)[:, slots] = self.k[i][: item.num_computed].transpose(0, 1)
            cache.v[0].flatten(1, 2)[:, slots] = self.v[i][: item.num_computed].transpose(0, 1)
            plan.append(scheduled(item, released(item, table, window=self.layer.window, block_size=self.block_size)))
        batch = build_forward_batch(plan, self.block_size, torch.device("cpu"))
        backend = TorchAttention(cache)
        backend.plan(batch)
        # as transformers' layers have it: heads before tokens in memory
        q = torch.cat([self.q[i] for i in chosen]).transpose(0, 1).contiguous().transpose(0, 1)
        k, v = (torch.cat([x[i][-self.items[i].num_new :] for i in chosen]) for x in (self.k, self.v))
        out = backend(q, k, v, self.layer, batch)
        return list(out.split([self.items[i].num_new for i in chosen])), attention_batches.attend_in_float64(
            q, cache.k[0], cache.v[0], self.layer, batch
        )


def random_item(rng: random.Random, *, trees: bool) -> Item:
    num_computed = rng.choice([0, rng.randrange(1, 20), rng.randrange(20, 150)])
    return attention_batches.random_item(rng, num_computed, most=3 * MAX_GROUPED_QUERIES, trees=trees)


def random_layer(rng: random.Random) -> AttentionLayer:
    num_kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 4])
    return AttentionLayer(
        index=0,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=rng.choice([32, 64, 80, 128]),
        scale=rng.uniform(0.05, 0.4),
        window=rng.choice([None, None, 1, rng.randrange(2, 100)]),
        soft_cap=rng.choice([None, None, rng.uniform(1, 30)]),
    )


@pytest.mark.parametrize("seed", range(40))
def test_any_batch_equals_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    items = [random_item(rng, trees=seed % 2 == 0) for _ in range(rng.randrange(1, 9))]
    case = Case(random_layer(rng), items, block_size=rng.choice([1, 4, 16]), dtype=torch.float32)
    if case.block_size == 1:
        case.block_size = 8 if sum(i.num_computed + i.num_new for i in items) > NUM_BLOCKS else 1
    outputs, expected = case.run(list(range(len(items))), shuffle=seed)
    torch.testing.assert_close(torch.cat(outputs).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_its_rounding(dtype: torch.dtype) -> None:
    layer = AttentionLayer(0, 6, 2, 64, 0.125)
    items = [Item(100, 1), Item(30, 1), Item(0, 40), Item(50, 5, (-1, 0, 1, 2))]
    outputs, expected = Case(layer, items, block_size=16, dtype=dtype).run([0, 1, 2, 3])
    torch.testing.assert_close(torch.cat(outputs).double(), expected, rtol=2e-2, atol=2e-2)


def test_a_sequence_gets_the_same_bits_alone_and_in_any_batch() -> None:
    rng = random.Random(1)
    items = [random_item(rng, trees=False) for _ in range(12)] + [Item(n, 1) for n in (3, 63, 64, 65, 140)]
    case = Case(AttentionLayer(0, 9, 3, 64, 0.125), items, block_size=16, dtype=torch.float32)
    alone = [case.run([i])[0][0] for i in range(len(items))]
    for shuffle in range(3):
        chosen = list(range(len(items)))
        rng.shuffle(chosen)
        for i, output in zip(chosen, case.run(chosen, shuffle=shuffle)[0], strict=True):
            assert torch.equal(output, alone[i]), items[i]


def test_a_neighbour_that_is_not_a_number_stays_alone() -> None:
    items = [Item(40, 1), Item(70, 1), Item(40, 3), Item(5, 30)]
    case = Case(AttentionLayer(0, 4, 2, 32, 0.2), items, block_size=16, dtype=torch.float32)
    healthy = case.run([0, 1, 2, 3])[0]
    case.q[1].fill_(math.nan)
    case.k[1].fill_(math.nan)
    case.v[1].fill_(math.nan)
    poisoned = case.run([0, 1, 2, 3])[0]
    assert poisoned[1].isnan().all()
    for i in (0, 2, 3):
        assert torch.equal(poisoned[i], healthy[i])


def test_a_cache_may_be_narrower_than_the_queries() -> None:
    layer = AttentionLayer(0, 4, 2, 32, 0.2)
    cache = KVCache([layer], num_blocks=4, block_size=16, dtype=torch.bfloat16)
    batch = build_forward_batch([scheduled(Item(0, 20), [2, 1])], 16, torch.device("cpu"))
    q, k, v = torch.randn(20, 4, 32), torch.randn(20, 2, 32), torch.randn(20, 2, 32)
    out = TorchAttention(cache)(q, k, v, layer, batch)
    expected = paged_attention(
        q, cache.k[0], cache.v[0], batch.block_tables, batch.query_starts, batch.seq_lens, layer.scale
    )
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected)


def test_layers_with_different_heads_and_windows_share_a_step() -> None:
    full, windowed = AttentionLayer(0, 4, 2, 32, 0.2), AttentionLayer(1, 4, 1, 64, 0.2, window=8)
    layers = [full, windowed, replace(full, index=2)]
    cache = KVCache(layers, num_blocks=8, block_size=4, dtype=torch.float32)
    backend = TorchAttention(cache)
    for num_computed in (0, 20):  # the second step must not see the plan of the first
        item = Item(num_computed, 20 if num_computed == 0 else 1)
        batch = build_forward_batch([scheduled(item, [3, 1, 6, 2, 5, 4])], 4, torch.device("cpu"))
        backend.plan(batch)
        for layer in layers:
            q = torch.randn(item.num_new, layer.num_heads, layer.head_dim)
            k, v = torch.randn(2, item.num_new, layer.num_kv_heads, layer.head_dim)
            out = backend(q, k, v, layer, batch)
            expected = paged_attention(
                q, cache.k[layer.index], cache.v[layer.index], batch.block_tables, batch.query_starts, batch.seq_lens,
                layer.scale, window=layer.window,
            )  # fmt: skip
            torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("keys_as_columns", [False, True])
def test_moved_tokens_are_read_before_any_is_written(keys_as_columns: bool) -> None:
    layers = [AttentionLayer(0, 2, 2, 8, 1.0), AttentionLayer(1, 4, 1, 16, 1.0)]
    cache = KVCache(layers, num_blocks=3, block_size=4, dtype=torch.float32, keys_as_columns=keys_as_columns)
    for kv in cache.kv:
        kv.copy_(torch.randn_like(kv))

    def tokens_of(index: int) -> Tensor:
        """[2, heads, slots, head size]"""
        keys = cache.k[index].transpose(2, 3) if keys_as_columns else cache.k[index]
        return torch.stack((keys, cache.v[index])).flatten(2, 3)

    before = [tokens_of(index).clone() for index in range(2)]
    cache.move(torch.tensor([5, 6, 11]), torch.tensor([4, 5, 6]))
    for index, old in enumerate(before):
        tokens = tokens_of(index)
        assert torch.equal(tokens[:, :, [4, 5, 6]], old[:, :, [5, 6, 11]])
        kept = [slot for slot in range(12) if slot not in (4, 5, 6)]
        assert torch.equal(tokens[:, :, kept], old[:, :, kept])


def test_keys_as_columns_are_one_panel_of_a_product() -> None:
    layer = AttentionLayer(0, 2, 2, 8, 1.0)
    cache = KVCache([layer], num_blocks=3, block_size=4, dtype=torch.float32, keys_as_columns=True)
    assert cache.k[0].shape == (2, 3, 8, 4)
    assert cache.v[0].shape == (2, 3, 4, 8)
    assert cache.k[0].is_contiguous()
    assert cache.k[0].data_ptr() == cache.kv[0].data_ptr()


def test_bytes_per_token_count_keys_and_values_of_every_layer() -> None:
    layers = [AttentionLayer(0, 9, 3, 64, 1.0), AttentionLayer(1, 4, 1, 16, 1.0)]
    cache = KVCache(layers, num_blocks=3, block_size=4, dtype=torch.bfloat16)
    total = sum(kv.numel() * kv.element_size() for kv in cache.kv)
    assert KVCache.bytes_per_token(layers, torch.bfloat16) * cache.num_slots == total


@pytest.mark.parametrize("block_size", [1, 4, 16, 24, 256])
def test_padding_is_bounded_and_whole_blocks(block_size: int) -> None:
    for num_tokens in range(1, 5000):
        rounded = rounded_context(num_tokens, block_size)
        assert rounded >= num_tokens
        assert rounded % block_size == 0
        assert rounded <= max(64, 2 * num_tokens) + block_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_cache_holds_zeros_and_takes_memory_only_where_it_is_used(dtype: torch.dtype) -> None:
    layers = [AttentionLayer(i, 2, 2, 64, 0.125) for i in range(2)]
    resident = psutil.Process().memory_info().rss
    cache = KVCache(layers, num_blocks=1 << 14, block_size=16, dtype=dtype)  # 268 MB and more
    assert psutil.Process().memory_info().rss - resident < 2**25
    for kv in cache.kv:
        assert kv.data_ptr() % 64 == 0
        assert not kv[:, :, ::1000].any()
    cache.v[1][:, 5] = 1
    assert cache.v[1].sum() == 2 * 16 * 64
    assert not cache.k[1][:, :100].any()
