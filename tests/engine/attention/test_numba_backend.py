"""Compiled attention: it also holds where contexts end at a span's border, and each row's bits depend on it alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache as once

import pytest
import torch

from engine.attention.numba_backend import NumbaAttention, scratch_bytes
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache
from kernels.numba.ops.attention import SPAN, TILE_ROWS
from kernels.numba.program.team import Team
from tests.support.attention_texts import Part, Texts, codec_of
from tests.support.conformance.attention import AttentionConformance, RowIndependence

LARGEST = AttentionLayer(0, 2 * TILE_ROWS, 1, 128, 1.0)


@once
def make_team(num_threads: int) -> Team:
    return Team(num_threads, scratch_bytes=scratch_bytes([LARGEST], 256))


class TestNumbaAttention(RowIndependence, AttentionConformance):
    num_random_batches = 60
    precisions = (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    )
    num_threads = 1
    head_dims = (16, 64, 80, 96, 128)
    block_sizes = (16, 32, 48, 64, 256)
    contexts = (0, 1, 15, 16, 17, SPAN - 1, SPAN, SPAN + 1, 2 * SPAN - 1, 2 * SPAN, 333)
    windows = (None, 30, 150, 200)  # of one span and of several

    def make_cache(self, layers: list[AttentionLayer], *, dtype: torch.dtype, **sizes: int) -> KVCache:
        return KVCache(layers, **sizes, codec=codec_of(dtype, keys_as_columns=True))

    def make(self, cache: KVCache) -> NumbaAttention:
        return NumbaAttention(cache, make_team(self.num_threads))

    @pytest.mark.parametrize("num_computed", [SPAN - 2, SPAN - 1, SPAN, SPAN + 1, 1000])
    @pytest.mark.parametrize("window", [None, SPAN - 1, SPAN, SPAN + 1])
    def test_contexts_that_end_at_a_span_s_border(self, window: int | None, num_computed: int) -> None:
        layer = AttentionLayer(0, 4, 2, 64, 0.125, window=window)
        parts = [Part(num_computed, 1), Part(num_computed, 2), Part(num_computed, 4, (-1, 0, 1))]
        self.check(layer, parts, block_size=32, precision=self.precisions[-2])

    def test_a_whole_prompt_of_several_spans(self) -> None:
        layer = AttentionLayer(0, 6, 2, 32, 0.2)
        self.check(layer, [Part(0, 3 * SPAN + 5), Part(0, SPAN)])
        self.check(replace(layer, window=70), [Part(0, 3 * SPAN + 5)])

    def test_windows_of_siblings_that_begin_in_different_spans(self) -> None:
        layer = AttentionLayer(0, TILE_ROWS // 2, 1, 16, 0.25, window=20)  # two tokens are a unit of work
        self.check(layer, [Part(SPAN + 20 - 3, 4, (-1, 0, -1))])

    def test_more_heads_of_a_key_head_than_a_tile_has_rows(self) -> None:
        self.check(AttentionLayer(0, TILE_ROWS + 2, 1, 64, 0.125), [Part(SPAN, 3), Part(17, 1)])


class TestNumbaAttentionOfThreeThreads(TestNumbaAttention):
    num_threads = 3


class TestNumbaAttentionOverInt8(TestNumbaAttention):
    kept_as = torch.int8
    precisions = ((torch.float32, torch.int8), (torch.bfloat16, torch.int8))

    @pytest.mark.parametrize("head_dim", [16, 80, 128])
    @pytest.mark.parametrize("block_size", [16, 64])
    def test_what_is_stored_is_what_the_definition_stores(self, head_dim: int, block_size: int) -> None:
        layer = AttentionLayer(0, 4, 2, head_dim, 0.2)
        texts = Texts(layer, [70], block_size=block_size)
        for rows in (texts.k[0], texts.v[0]):
            rows *= torch.logspace(-6, 6, 70)[:, None, None]
            rows[3], rows[9, 0], rows[12, 1, -1], rows[13, 0, 0] = 0.0, 1e-35, torch.nan, -torch.inf
        kept, expected = (
            self.make_cache([layer], num_blocks=texts.num_blocks, block_size=block_size, dtype=torch.int8)
            for _ in range(2)
        )
        step = {0: Part(0, 70)}
        self.step(self.make(kept), texts, step)
        slots = texts.batch(step, self.device).slots[0]
        expected.codec.write(expected.blocks, layer, slots, texts.k[0], texts.v[0])
        for ours, theirs in ((kept.k, expected.k), (kept.v, expected.v)):
            assert torch.equal(ours[0], theirs[0])
        for ours, theirs in ((kept.k_scales, expected.k_scales), (kept.v_scales, expected.v_scales)):
            torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True)


class TestNumbaAttentionOfThreeThreadsOverInt8(TestNumbaAttentionOverInt8):
    num_threads = 3
