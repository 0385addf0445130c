"""The memory of keys and values: what lies where, what it takes, and how tokens are moved."""

import psutil
import pytest
import torch
from torch import Tensor

from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache


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
