"""The codecs of the KV cache."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from engine.kv_cache.codec import KV_CODECS, DenseCodec, KVCodec, make_codec
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.scaled_codec import ScaledCodec
from engine.kv_cache.storage import KVCache, bytes_per_block
from tests.support.conformance.kv_codec import KVCodecConformance


class TestDenseFloat32(KVCodecConformance):
    def make(self) -> KVCodec:
        return DenseCodec(torch.float32)


class TestDenseBfloat16(KVCodecConformance):
    tolerance = 2**-8

    def make(self) -> KVCodec:
        return DenseCodec(torch.bfloat16)


class TestDenseFloat16WithKeysAsColumns(KVCodecConformance):
    tolerance = 2**-11

    def make(self) -> KVCodec:
        return DenseCodec(torch.float16, keys_as_columns=True)


class TestInt8(KVCodecConformance):
    tolerance = 1 / 253

    def make(self) -> KVCodec:
        return ScaledCodec(torch.int8)


class TestInt8WithKeysAsColumns(KVCodecConformance):
    tolerance = 1 / 253

    def make(self) -> KVCodec:
        return ScaledCodec(torch.int8, keys_as_columns=True)


class TestFp8(KVCodecConformance):
    tolerance = 2**-4

    def make(self) -> KVCodec:
        return ScaledCodec(torch.float8_e4m3fn)


def test_every_codec_and_layout_has_a_name_of_its_own() -> None:
    names = {make_codec(name, keys_as_columns=columns).name for name, columns in product(KV_CODECS, (False, True))}
    assert len(names) == 2 * len(KV_CODECS)


@pytest.mark.parametrize("name", KV_CODECS)
def test_a_codec_is_made_by_the_name_that_the_config_has(name: str) -> None:
    codec = make_codec(name, keys_as_columns=True)
    assert codec.name.startswith(name)
    assert codec.keys_as_columns


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_token_s_codes_are_its_own_whatever_is_stored_with_it(dtype: torch.dtype) -> None:
    """Or a prefix that is found would not be what computing it anew stores."""
    torch.manual_seed(0)
    layer, codec = AttentionLayer(0, 4, 2, 32, 1.0), ScaledCodec(dtype)
    k, v = torch.randn(2, 32, 2, 32) * torch.logspace(-3, 3, 32)[:, None, None]
    caches = [KVCache([layer], num_blocks=2, block_size=16, codec=codec) for _ in range(2)]
    codec.write(caches[0].blocks, layer, torch.arange(32), k, v)
    for slot in torch.randperm(32):
        codec.write(caches[1].blocks, layer, slot[None], k[slot, None], v[slot, None])
    assert torch.equal(caches[0].blocks, caches[1].blocks)


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_8_bits_take_half_the_bytes_of_16_and_4_for_a_scale(name: str, head_dim: int) -> None:
    layers = [AttentionLayer(i, 8, 2, head_dim, 1.0) for i in range(3)]
    narrow, wide = (bytes_per_block(layers, 16, make_codec(dtype)) for dtype in (name, "float16"))
    assert narrow == wide // 2 + 3 * 2 * 2 * 16 * 4


def test_scales_of_16_tokens_are_the_cache_line_behind_their_codes() -> None:
    layers = [AttentionLayer(0, 4, 2, 64, 1.0), AttentionLayer(1, 4, 1, 80, 1.0), AttentionLayer(2, 4, 2, 64, 1.0)]
    cache = KVCache(layers, num_blocks=3, block_size=16, codec=ScaledCodec(torch.int8, keys_as_columns=True))
    for layer in layers:
        parts = (cache.k, cache.k_scales), (cache.v, cache.v_scales)
        for codes, scales in ((codes[layer.index], scales[layer.index]) for codes, scales in parts):
            assert scales is not None
            for block in range(3):
                for head in range(layer.num_kv_heads):
                    begin = codes[block, head].data_ptr()
                    assert begin % 64 == 0
                    assert scales[block, head].data_ptr() == begin + 16 * layer.head_dim
