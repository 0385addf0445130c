"""The codecs of the KV cache."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from engine.kv_cache.codec import KV_CODECS, DenseCodec, KVCodec, make_codec
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


def test_every_codec_and_layout_has_a_name_of_its_own() -> None:
    names = {make_codec(name, keys_as_columns=columns).name for name, columns in product(KV_CODECS, (False, True))}
    assert len(names) == 2 * len(KV_CODECS)


@pytest.mark.parametrize("name", KV_CODECS)
def test_a_codec_is_made_by_the_name_that_the_config_has(name: str) -> None:
    codec = make_codec(name, keys_as_columns=True)
    assert codec.name.startswith(name)
    assert codec.keys_as_columns
