"""The laws of a KV codec (`engine.kv_cache.codec.KVCodec`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kv_cache.codec import KVCodec
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache, bytes_per_block

NUM_BLOCKS, BLOCK_SIZE = 5, 16
LAYERS = [AttentionLayer(0, 4, 2, 32, 1.0), AttentionLayer(1, 6, 3, 64, 1.0), AttentionLayer(2, 4, 1, 48, 1.0)]


class KVCodecConformance:
    """Each test works on memory as a cache hands it out: a layer's bytes of all blocks, between those of others.

    tolerance: of what is read, relative to the largest element of its token and head
    """

    tolerance = 0.0

    def make(self) -> KVCodec:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _seed(self) -> None:
        torch.manual_seed(0)

    @pytest.fixture(params=range(len(LAYERS)))
    def layer(self, request: pytest.FixtureRequest) -> AttentionLayer:
        return LAYERS[request.param]

    @pytest.fixture
    def memory(self, layer: AttentionLayer) -> Tensor:
        """Full of what another model left there."""
        size = self.make().bytes_per_block(layer, BLOCK_SIZE)
        around = torch.randint(256, (NUM_BLOCKS, size + 2 * 1536), dtype=torch.uint8)
        return around[:, 1536 : 1536 + size]

    def tokens(self, layer: AttentionLayer, num_tokens: int) -> tuple[Tensor, Tensor]:
        k, v = 3 * torch.randn(2, num_tokens, layer.num_kv_heads, layer.head_dim)
        return k, v

    def assert_close(self, found: Tensor, expected: Tensor) -> None:
        bound = self.tolerance * expected.abs().amax(-1, keepdim=True)
        assert ((found.float() - expected.float()).abs() <= bound).all()

    def test_what_is_written_is_read_again(self, layer: AttentionLayer, memory: Tensor) -> None:
        codec, slots = self.make(), torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:23]
        k, v = self.tokens(layer, 23)
        codec.write(memory, layer, slots, k, v)
        order = torch.randperm(23)
        keys, values = codec.read(memory, layer, slots[order])
        self.assert_close(keys, k[order])
        self.assert_close(values, v[order])

    def test_a_token_leaves_the_others_as_they_are(self, layer: AttentionLayer, memory: Tensor) -> None:
        codec, slots = self.make(), torch.arange(NUM_BLOCKS * BLOCK_SIZE)
        codec.write(memory, layer, slots, *self.tokens(layer, len(slots)))
        before = codec.read(memory, layer, slots)
        k, v = (1000 * x for x in self.tokens(layer, 2))
        codec.write(memory, layer, torch.tensor([20, 47]), k, v)
        others = [slot for slot in slots.tolist() if slot not in (20, 47)]
        for old, new in zip(before, codec.read(memory, layer, slots), strict=True):
            assert torch.equal(new[others], old[others])
            assert not torch.equal(new[[20, 47]], old[[20, 47]])

    def test_a_block_is_written_within_its_own_bytes(self, layer: AttentionLayer, memory: Tensor) -> None:
        codec = self.make()
        everything = memory.as_strided((NUM_BLOCKS, memory.stride(0)), memory.stride(), 0)
        before = everything.clone()
        codec.write(memory, layer, 2 * BLOCK_SIZE + torch.arange(BLOCK_SIZE), *self.tokens(layer, BLOCK_SIZE))
        changed = (everything != before).nonzero()
        assert set(changed[:, 0].tolist()) == {2}
        assert changed[:, 1].min() >= 1536
        assert changed[:, 1].max() < 1536 + memory.shape[1]

    def test_a_block_s_bytes_are_all_there_is_to_it(self, layer: AttentionLayer, memory: Tensor) -> None:
        codec, slots = self.make(), BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        codec.write(memory, layer, slots, *self.tokens(layer, BLOCK_SIZE))
        elsewhere = torch.zeros(2, memory.shape[1], dtype=torch.uint8)
        elsewhere[0] = memory[1]
        copied = codec.read(elsewhere, layer, torch.arange(BLOCK_SIZE))
        for found, expected in zip(copied, codec.read(memory, layer, slots), strict=True):
            assert torch.equal(found, expected)

    def test_tokens_move_without_a_change(self, layer: AttentionLayer, memory: Tensor) -> None:
        codec, slots = self.make(), torch.arange(NUM_BLOCKS * BLOCK_SIZE)
        codec.write(memory, layer, slots, *self.tokens(layer, len(slots)))
        before = codec.read(memory, layer, slots)
        sources, targets = torch.tensor([15, 16, 50]), torch.tensor([14, 15, 16])
        codec.move(memory, layer, sources, targets)
        after = codec.read(memory, layer, slots)
        kept = [slot for slot in slots.tolist() if slot not in (14, 15, 16)]
        for old, new in zip(before, after, strict=True):
            assert torch.equal(new[targets], old[sources])
            assert torch.equal(new[kept], old[kept])

    def test_views_show_elements_where_tokens_are(self, layer: AttentionLayer, memory: Tensor) -> None:
        codec = self.make()
        keys, values = codec.views(memory, layer)
        assert keys.shape == values.shape == (NUM_BLOCKS, layer.num_kv_heads, BLOCK_SIZE, layer.head_dim)
        assert keys.dtype == values.dtype == codec.dtype
        assert (keys.stride()[2:] == (1, BLOCK_SIZE)) == codec.keys_as_columns
        memory.zero_()
        k, v = (x.abs() + 1 for x in self.tokens(layer, 1))
        codec.write(memory, layer, torch.tensor([2 * BLOCK_SIZE + 7]), k, v)
        for view in (keys, values):
            assert view.float()[2, :, 7].all()
            assert view.float().count_nonzero() == layer.num_kv_heads * layer.head_dim

    def test_scales_are_shown_where_tokens_are(self, layer: AttentionLayer, memory: Tensor) -> None:
        codec = self.make()
        slots = torch.arange(NUM_BLOCKS * BLOCK_SIZE)
        k, v = self.tokens(layer, len(slots))
        codec.write(memory, layer, slots, k, v)
        shown = codec.scales(memory, layer)
        assert (shown is None) == (codec.dtype.itemsize > 1)
        if shown is None:
            return
        tokens = codec.read(memory, layer, slots)
        for elements, scales, expected in zip(codec.views(memory, layer), shown, tokens, strict=True):
            assert scales.shape == elements.shape[:3]
            assert [4 * stride for stride in scales.stride()[:2]] == list(elements.stride()[:2])
            numbers = elements.float() * scales[..., None]
            assert torch.equal(numbers.transpose(1, 2).flatten(0, 1), expected)

    def test_what_is_no_number_stays_that(self, layer: AttentionLayer, memory: Tensor) -> None:
        """And zeros stay zeros, and so do the neighbours."""
        codec, slots = self.make(), torch.tensor([3, 17, 40, 41])
        k, v = self.tokens(layer, 4)
        k[0], v[1], k[2, :, 5] = 0.0, 0.0, torch.nan
        codec.write(memory, layer, slots, k, v)
        keys, values = codec.read(memory, layer, slots)
        assert not keys[0].any()
        assert not values[1].any()
        assert keys[2, :, 5].isnan().all()
        for found in (keys[[0, 1, 3]], values):
            assert found.isfinite().all()

    def test_a_cache_has_each_layer_s_bytes_in_every_block(self) -> None:
        codec = self.make()
        cache = KVCache(LAYERS, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, codec=codec)
        assert cache.blocks.shape == (NUM_BLOCKS, bytes_per_block(LAYERS, BLOCK_SIZE, codec))
        for layer in LAYERS if codec.scales(cache.blocks[:, :0], LAYERS[0]) is None else []:
            parts, step = cache.parts(layer.index), cache.parts_per_block(layer.index)
            assert parts.data_ptr() == min(x[layer.index].data_ptr() for x in (cache.k, cache.v))
            last = (NUM_BLOCKS - 1) * step + 2 * layer.num_kv_heads - 1
            assert parts[last].data_ptr() == cache.v[layer.index][-1, -1].data_ptr()

    def test_its_name_tells_it_from_others(self) -> None:
        assert self.make().name == self.make().name != ""
