"""The laws of an attention back end (`engine.attention.backend.AttentionBackend`)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.attention.backend import AttentionBackend, HeadNorms
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache
from kernels.reference.qkv import normalise_and_rotate
from tests.support.attention_texts import Part, Texts, codec_of, random_part, random_parts, spoil

# rtol, atol: scores of up to 10 in bfloat16's 8 bits are off by 0.02, so weights by 2%, of values of up to 4
TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (5e-2, 8e-2), torch.float16: (2e-2, 2e-2)}
EXACT = (0.0, 0.0)  # 8-bit codes are widened without a loss, and the definition has the same ones


class AttentionConformance:
    """Every step goes through the back end, that which stores the context too: what lies where in a cache is its own.

    A back end that promises more than the protocol says so by further base classes: `RowIndependence`.
    """

    num_random_batches = 40
    kept_as = torch.float32  # what the cache keeps keys and values as, where a test does not care
    stores_what_torch_rounds = True  # else a code may be the next one where a key or value lies between two
    head_dims: tuple[int, ...] = (32, 64, 80, 128)
    block_sizes: tuple[int, ...] = (4, 16)
    contexts: tuple[int, ...] = (0, 1, 15, 16, 17, 63, 64, 65, 150)  # tokens computed before a step
    longest_chunk = 80
    num_shuffles = 3  # of a batch whose sequences must not notice
    rounds_queries_to_the_cache = False  # where that is narrower; else it costs no more than keys and values lose
    precisions: tuple[tuple[torch.dtype, torch.dtype], ...] = (  # of queries, and of the cache
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    )

    @pytest.fixture(autouse=True)
    def _reproducible(self, one_thread_and_seed: None) -> None:
        """Every test begins with the same seed."""

    def make(self, cache: KVCache) -> AttentionBackend:
        """The back end of a cache that `make_cache` made."""
        raise NotImplementedError

    def make_cache(
        self, layers: list[AttentionLayer], *, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> KVCache:
        return KVCache(layers, num_blocks=num_blocks, block_size=block_size, codec=codec_of(dtype), device=self.device)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "seed" in metafunc.fixturenames:
            metafunc.parametrize("seed", range(self.num_random_batches))
        if "precision" in metafunc.fixturenames:
            metafunc.parametrize("precision", self.precisions, ids=lambda pair: "{} over {}".format(*pair))
        if "kept" in metafunc.fixturenames:
            metafunc.parametrize("kept", sorted({kept for _, kept in self.precisions}, key=str), ids=str)

    # --- how a case is run ---

    def start(self, texts: Texts, dtype: torch.dtype | None = None) -> AttentionBackend:
        sizes = {"num_blocks": texts.num_blocks, "block_size": texts.block_size}
        cache = self.make_cache([texts.layer], **sizes, dtype=dtype or self.kept_as)
        spoil(cache)
        return self.make(cache)

    def step(self, backend: AttentionBackend, texts: Texts, step: Mapping[int, Part]) -> list[Tensor]:
        """Computes these parts of texts as one batch. Returns the rows of each, on the host."""
        batch = texts.batch(step, self.device)
        backend.plan(batch)
        out = backend(*texts.rows(step, self.device), texts.layer, batch)
        return list(out.cpu().split([part.num_new for part in step.values()]))

    def store(self, backend: AttentionBackend, texts: Texts, parts: list[Part]) -> None:
        """Computes what comes before the parts, each text in a step of its own."""
        for index, part in enumerate(parts):
            if part.num_computed:
                self.step(backend, texts, {index: Part(0, part.num_computed)})

    def check(
        self,
        layer: AttentionLayer,
        parts: list[Part],
        *,
        block_size: int = 16,
        precision: tuple[torch.dtype, torch.dtype] | None = None,
    ) -> None:
        """One batch of these parts is what the definition says."""
        dtype, kept_as = precision or (torch.float32, self.kept_as)
        texts = Texts(layer, [part.num_tokens for part in parts], block_size=block_size, dtype=dtype)
        backend = self.start(texts, kept_as)
        self.store(backend, texts, parts)
        outputs = self.step(backend, texts, dict(enumerate(parts)))
        rounding = TOLERANCES.get(kept_as, EXACT) if self.rounds_queries_to_the_cache else EXACT
        rtol, atol = max(TOLERANCES[dtype], rounding)
        for index, (part, output) in enumerate(zip(parts, outputs, strict=True)):
            expected = texts.define(index, part, kept_as=kept_as)
            assert output.dtype == dtype
            torch.testing.assert_close(output.double(), expected, rtol=rtol, atol=atol)

    def random_layer(self, rng: random.Random) -> AttentionLayer:
        num_kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 4, 7])
        return AttentionLayer(
            index=0,
            num_heads=num_kv_heads * group,
            num_kv_heads=num_kv_heads,
            head_dim=rng.choice(self.head_dims),
            scale=rng.uniform(0.05, 0.4),
            window=rng.choice([None, None, 1, rng.randrange(2, 100), rng.randrange(100, 300)]),
            soft_cap=rng.choice([None, None, rng.uniform(1, 30)]),
        )

    def random_part(self, rng: random.Random, *, trees: bool) -> Part:
        return random_part(rng, rng.choice(self.contexts), most=self.longest_chunk, trees=trees)

    # --- it is the definition ---

    def test_any_batch_of_chunks_decoding_and_drafts_equals_the_definition(self, seed: int) -> None:
        rng = random.Random(seed)
        parts = [self.random_part(rng, trees=seed % 2 == 0) for _ in range(rng.randrange(1, 7))]
        precision = self.precisions[seed % len(self.precisions)]
        self.check(self.random_layer(rng), parts, block_size=rng.choice(self.block_sizes), precision=precision)

    def test_results_are_as_close_as_the_precision_allows(self, precision: tuple[torch.dtype, torch.dtype]) -> None:
        layer = AttentionLayer(0, 6, 2, 64, 0.125)
        parts = [Part(100, 1), Part(30, 1), Part(0, 40), Part(50, 5, (-1, 0, 1, 2))]
        self.check(layer, parts, precision=precision)

    @pytest.mark.parametrize("window", [None, 3, 40])
    def test_drafts_see_the_context_and_their_ancestors_alone(self, window: int | None) -> None:
        trees = [(-1, -1, 0, 0), (-1, 0, -1, 2, 2, 1), (-1, 0, 1)]
        parts = [Part(20 * i, len(tree) + 2, tree) for i, tree in enumerate(trees)]
        self.check(AttentionLayer(0, 4, 2, 32, 0.2, window=window), [Part(33, 1), *parts])

    def test_the_window_of_a_sibling_may_begin_before_that_of_the_draft_before_it(self) -> None:
        layer = AttentionLayer(0, 4, 1, 32, 0.25, window=20)
        self.check(layer, [Part(num_computed, 4, (-1, 0, -1)) for num_computed in (29, 31, 62)])

    @pytest.mark.parametrize("soft_cap", [None, 5.0])
    def test_large_scores_do_not_overflow(self, soft_cap: float | None) -> None:
        texts = Texts(AttentionLayer(0, 4, 2, 32, 1.0, soft_cap=soft_cap), [100], block_size=16)
        texts.q[0] *= 1000.0  # scores of thousands: one key takes all, or a few where they are capped
        backend, part = self.start(texts), Part(80, 20)
        self.store(backend, texts, [part])
        (output,) = self.step(backend, texts, {0: part})
        # float32 rounds a score of 8,000 by 2^-12, and weights follow by that much of themselves
        expected = texts.define(0, part, kept_as=self.kept_as)
        torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=5e-3)

    # --- steps ---

    @pytest.mark.parametrize("window", [None, 30])
    def test_what_a_step_stores_is_what_later_steps_attend_to(self, window: int | None) -> None:
        rng = random.Random(4)
        lengths = [1, 20, 90]
        layer = replace(self.random_layer(rng), window=window)
        texts = Texts(layer, lengths, block_size=max(self.block_sizes))
        backend = self.start(texts)
        for step in random_parts(rng, lengths, most=40):
            for (index, part), output in zip(step.items(), self.step(backend, texts, step), strict=True):
                expected = texts.define(index, part, kept_as=self.kept_as)
                torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)

    def test_layers_with_different_heads_and_windows_share_a_step(self) -> None:
        full, windowed = AttentionLayer(0, 4, 2, 32, 0.2), AttentionLayer(1, 4, 1, 64, 0.2, window=8)
        texts = [Texts(layer, [41], block_size=16) for layer in (full, windowed, replace(full, index=2))]
        layers = [one.layer for one in texts]
        cache = self.make_cache(layers, num_blocks=texts[0].num_blocks, block_size=16, dtype=self.kept_as)
        backend = self.make(cache)
        for part in (Part(0, 40), Part(40, 1)):  # the second step must not see the plan of the first
            step = {0: part}
            for one in texts:
                one.tables = texts[0].tables
            batch = texts[0].batch(step, self.device)
            backend.plan(batch)
            for one in texts:
                output = backend(*one.rows(step, self.device), one.layer, batch).cpu()
                expected = one.define(0, part, kept_as=self.kept_as)
                torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("norms", ["none", "heads", "all heads together"])
    @pytest.mark.parametrize("rotates", [False, True])
    def test_a_projection_is_normalised_and_rotated_before_it_is_stored(self, norms: str, rotates: bool) -> None:
        layer, num_computed = AttentionLayer(0, 4, 2, 32, 0.2), 20
        texts = Texts(layer, [num_computed + 3], block_size=16)
        width = {"none": 0, "heads": 1, "all heads together": layer.num_heads}[norms]
        weights = [
            torch.randn(num * layer.head_dim, device=self.device) if num else None
            for num in (width, min(width, layer.num_kv_heads))
        ]
        head_norms = HeadNorms(*weights, 1e-5)
        backend = self.start(texts)
        projected = [torch.cat(rows, dim=1) for rows in zip(texts.q, texts.k, texts.v, strict=True)]
        for part in (Part(0, num_computed), Part(num_computed, 3)):
            rows = slice(part.num_computed, part.num_tokens)
            angles = torch.arange(rows.start, rows.stop)[:, None] * torch.logspace(0, -2, layer.head_dim // 2)
            rotation = (angles.cos().to(self.device), angles.sin().to(self.device)) if rotates else None
            cos, sin = rotation or (None, None)
            q, k, _ = texts.rows({0: part}, self.device)
            q, k = normalise_and_rotate(q, k, cos, sin, q_weight=weights[0], k_weight=weights[1], eps=1e-5)
            texts.q[0][rows], texts.k[0][rows] = q.cpu(), k.cpu()
            batch = texts.batch({0: part}, self.device)
            backend.plan(batch)
            qkv = projected[0][rows].to(self.device)
            output = backend.attend_projection(qkv, rotation, head_norms, layer, batch).cpu()
            expected = texts.define(0, part, kept_as=self.kept_as)
            tolerance = 1e-4 if self.stores_what_torch_rounds else 2e-2
            torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)

    def test_queries_may_lie_with_heads_before_tokens(self) -> None:
        """As transformers' layers have them in memory."""
        texts = Texts(AttentionLayer(0, 4, 2, 32, 0.2), [40, 9], block_size=16)
        backend, step = self.start(texts), {0: Part(0, 40), 1: Part(0, 9)}
        expected = torch.cat(self.step(backend, texts, step))
        q, k, v = texts.rows(step, self.device)
        batch = texts.batch(step, self.device)
        backend.plan(batch)
        output = backend(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, texts.layer, batch)
        assert torch.equal(output.cpu(), expected)

    # --- batches ---

    def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(self) -> None:
        rng = random.Random(1)
        parts = [self.random_part(rng, trees=False) for _ in range(6)] + [Part(n, 1) for n in self.contexts[-4:]]
        texts = Texts(AttentionLayer(0, 9, 3, 64, 0.125), [part.num_tokens for part in parts], block_size=16)
        backend = self.start(texts)
        self.store(backend, texts, parts)
        alone = [self.step(backend, texts, {index: part})[0] for index, part in enumerate(parts)]
        for _ in range(self.num_shuffles):
            chosen = rng.sample(range(len(parts)), len(parts))
            outputs = self.step(backend, texts, {index: parts[index] for index in chosen})
            for index, output in zip(chosen, outputs, strict=True):
                assert torch.equal(output, alone[index]), parts[index]

    @pytest.mark.parametrize("window", [None, 30])
    def test_a_neighbour_that_is_not_a_number_stays_alone(self, window: int | None) -> None:
        parts = [Part(40, 1), Part(70, 1), Part(40, 3, (-1, 0)), Part(5, 30)]
        texts = Texts(
            AttentionLayer(0, 4, 2, 32, 0.2, window=window), [part.num_tokens for part in parts], block_size=16
        )
        backend = self.start(texts)
        self.store(backend, texts, parts)
        healthy = self.step(backend, texts, dict(enumerate(parts)))
        for rows in (texts.q, texts.k, texts.v):
            rows[1].fill_(math.nan)
        self.step(backend, texts, {1: Part(0, parts[1].num_computed)})
        poisoned = self.step(backend, texts, dict(enumerate(parts)))
        assert poisoned[1].isnan().all()
        for index in (0, 2, 3):
            assert healthy[index].isfinite().all()
            assert torch.equal(poisoned[index], healthy[index])


class RowIndependence:
    """For an `AttentionConformance` of a back end that promises more: a row's bits depend on the row alone."""

    windows: tuple[int | None, ...] = (None, 30)

    def test_a_row_has_the_same_bits_in_any_batch_and_any_chunk(self: AttentionConformance, kept: torch.dtype) -> None:
        for window in self.windows:
            rng = random.Random(window or 0)
            lengths = [rng.choice(self.contexts) or 1 for _ in range(4)] + [2 * max(self.contexts)]
            layer = replace(self.random_layer(rng), window=window)
            texts = Texts(layer, lengths, block_size=rng.choice(self.block_sizes))
            backend = self.start(texts, kept)
            alone = [self.step(backend, texts, {i: Part(0, length)})[0] for i, length in enumerate(lengths)]
            for most in (40, 200):
                backend = self.start(texts, kept)
                rows: list[list[Tensor]] = [[] for _ in lengths]
                for step in random_parts(rng, lengths, most=most):
                    for i, output in zip(step, self.step(backend, texts, step), strict=True):
                        rows[i].append(output)
                for parts, whole in zip(rows, alone, strict=True):
                    assert torch.equal(torch.cat(parts), whole)
