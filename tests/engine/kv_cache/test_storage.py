"""The memory of keys and values: what lies where, what it takes, and how tokens are moved."""

from dataclasses import replace

import psutil
import pytest
import torch
from torch import Tensor

from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.layer_spec import AttentionLayer, group_layers
from engine.kv_cache.storage import KVCache, bytes_per_block


@pytest.mark.parametrize("keys_as_columns", [False, True])
def test_moved_tokens_are_read_before_any_is_written(keys_as_columns: bool) -> None:
    layers = [AttentionLayer(0, 2, 2, 8, 1.0), AttentionLayer(1, 4, 1, 16, 1.0)]
    cache = KVCache(
        layers, num_blocks=3, block_size=4, codec=DenseCodec(torch.float32, keys_as_columns=keys_as_columns)
    )
    cache.blocks.view(torch.float32).normal_()

    def tokens_of(index: int) -> Tensor:
        """[2, heads, slots, head size]"""
        return torch.stack((cache.k[index], cache.v[index])).transpose(1, 2).flatten(2, 3)

    before = [tokens_of(index).clone() for index in range(2)]
    cache.move(torch.tensor([[5, 6, 11]]), torch.tensor([[4, 5, 6]]))
    for index, old in enumerate(before):
        tokens = tokens_of(index)
        assert torch.equal(tokens[:, :, [4, 5, 6]], old[:, :, [5, 6, 11]])
        kept = [slot for slot in range(12) if slot not in (4, 5, 6)]
        assert torch.equal(tokens[:, :, kept], old[:, :, kept])


@pytest.mark.parametrize("keys_as_columns", [False, True])
def test_a_block_is_one_piece_with_the_keys_and_values_of_all_layers(keys_as_columns: bool) -> None:
    layers = [AttentionLayer(0, 2, 2, 8, 1.0), AttentionLayer(1, 4, 1, 12, 1.0), AttentionLayer(2, 2, 2, 8, 1.0)]
    cache = KVCache(
        layers, num_blocks=3, block_size=4, codec=DenseCodec(torch.float32, keys_as_columns=keys_as_columns)
    )
    assert cache.blocks[1].is_contiguous()
    for view in (*cache.k, *cache.v):
        assert not view[1].any()
        view[1] += 1  # each place once
    of_layers = sum(2 * layer.num_kv_heads * layer.head_dim for layer in layers) * 4
    assert cache.blocks[1].view(torch.float32).sum() == of_layers
    assert not cache.blocks[[0, 2]].any()
    copy = torch.zeros_like(cache.blocks[1]).copy_(cache.blocks[1])
    cache.blocks[2] = copy
    for view in (*cache.k, *cache.v):
        assert torch.equal(view[2], view[1])


def test_a_block_has_room_for_each_group_and_is_read_as_one() -> None:
    windows = {0: 8, 1: None, 2: 8, 3: 8}
    layers = [replace(AttentionLayer(i, 2, 2, 8, 1.0), window=window) for i, window in windows.items()]
    layers = group_layers(layers)
    assert [layer.group for layer in layers] == [0, 3, 1, 2]
    codec = DenseCodec(torch.float32)
    assert 4 * bytes_per_block(layers, 4, codec) == bytes_per_block([replace(x, group=0) for x in layers], 4, codec)
    cache = KVCache(layers, num_blocks=5, block_size=4, codec=codec)
    for layer in layers:
        cache.k[layer.index][1 + layer.group] += 1 + layer.index  # a block of its own
    slots = torch.tensor([[4 * (1 + group), 4 * (1 + group) + 1] for group in range(4)])
    cache.move(slots, slots + 2)
    for layer in layers:
        assert (cache.k[layer.index][1 + layer.group] == 1 + layer.index).all()
    assert not cache.blocks[0].any()


def test_keys_as_columns_are_one_panel_of_a_product() -> None:
    layer = AttentionLayer(0, 2, 2, 8, 1.0)
    cache = KVCache([layer], num_blocks=3, block_size=4, codec=DenseCodec(torch.float32, keys_as_columns=True))
    assert cache.k[0].shape == cache.v[0].shape == (3, 2, 4, 8)
    assert cache.k[0][1, 1].T.is_contiguous()
    assert cache.v[0][1, 1].is_contiguous()
    assert cache.k[0].data_ptr() == cache.blocks.data_ptr()


def test_parts_are_the_keys_and_values_of_a_head_in_a_block() -> None:
    layers = [
        AttentionLayer(0, 2, 2, 8, 1.0),
        AttentionLayer(1, 4, 3, 12, 1.0),
    ]  # of sizes that do not divide the block
    cache = KVCache(layers, num_blocks=3, block_size=4, codec=DenseCodec(torch.float32))
    cache.blocks.view(torch.float32).normal_()
    for layer in layers:
        parts, step = cache.parts(layer.index), cache.parts_per_block(layer.index)
        for block in range(3):
            for head in range(layer.num_kv_heads):
                assert torch.equal(parts[block * step + 2 * head], cache.k[layer.index][block, head].flatten())
                assert torch.equal(parts[block * step + 2 * head + 1], cache.v[layer.index][block, head].flatten())


@pytest.mark.parametrize("head_dims", [(64, 64), (64, 12)])
def test_bytes_per_block_are_those_of_the_cache(head_dims: tuple[int, int]) -> None:
    layers = [AttentionLayer(i, 4, i + 1, head_dim, 1.0) for i, head_dim in enumerate(head_dims)]
    codec = DenseCodec(torch.bfloat16)
    cache = KVCache(layers, num_blocks=3, block_size=4, codec=codec)
    assert bytes_per_block(layers, 4, codec) == cache.blocks[0].nbytes
    of_tokens = 4 * sum(2 * layer.num_kv_heads * layer.head_dim for layer in layers) * 2
    assert of_tokens <= cache.blocks[0].nbytes < 2 * of_tokens
    assert head_dims != (64, 64) or cache.blocks[0].nbytes == of_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_cache_holds_zeros_and_takes_memory_only_where_it_is_used(dtype: torch.dtype) -> None:
    layers = [AttentionLayer(i, 2, 2, 64, 0.125) for i in range(2)]
    resident = psutil.Process().memory_info().rss
    cache = KVCache(layers, num_blocks=1 << 14, block_size=16, codec=DenseCodec(dtype))  # 268 MB and more
    assert psutil.Process().memory_info().rss - resident < 2**25
    for layer in layers:
        assert cache.k[layer.index].data_ptr() % 64 == 0
    assert not cache.blocks[::1000].any()
    cache.v[1][5] = 1
    assert cache.v[1][:100].sum() == 2 * 16 * 64
    assert not cache.k[1][:100].any()
