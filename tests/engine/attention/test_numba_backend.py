"""The compiled attention against the definition in float64, and its rows' independence of batch and chunk."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.attention.numba_backend import NumbaAttention, scratch_bytes
from engine.batch.forward_batch import ForwardBatch, build_forward_batch
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache
from kernels.numba.ops.attention import SPAN, TILE_ROWS
from kernels.numba.program.team import Team
from tests.support import attention_batches

Item, scheduled, released = attention_batches.Item, attention_batches.scheduled, attention_batches.released
LENGTHS = (0, 1, 15, 16, 17, SPAN - 1, SPAN, SPAN + 1, 2 * SPAN - 1, 2 * SPAN, 333)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


class Texts:
    """Queries, keys and values of some sequences, and a cache that holds NaN wherever none of them has a token."""

    def __init__(
        self, layer: AttentionLayer, lengths: list[int], *, block_size: int = 16, dtype: torch.dtype = torch.float32
    ) -> None:
        self.layer, self.block_size = layer, block_size
        shape = (layer.num_kv_heads, layer.head_dim)
        self.q = [torch.randn(length, layer.num_heads, layer.head_dim) for length in lengths]
        self.k = [torch.randn(length, *shape) for length in lengths]
        self.v = [torch.randn(length, *shape) for length in lengths]
        sizes = [-(-length // block_size) for length in lengths]
        num_blocks = sum(sizes) + 2
        self.cache = KVCache([layer], num_blocks=num_blocks, block_size=block_size, dtype=dtype, keys_as_columns=True)
        self.cache.kv[0].fill_(math.nan)
        free = torch.randperm(num_blocks - 1).add(1).tolist()  # block 0 is the one that stands for freed blocks
        self.tables = [[free.pop() for _ in range(size)] for size in sizes]

    def store(self, index: int, num_tokens: int) -> None:
        """The first tokens of a sequence, as earlier steps left them."""
        position = torch.arange(num_tokens)
        blocks = torch.tensor(self.tables[index])[position // self.block_size] if num_tokens else position
        offsets = position % self.block_size
        for cache, x in zip(rows_of(self.cache, 0), (self.k[index], self.v[index]), strict=True):
            cache[:, blocks, offsets] = x[:num_tokens].transpose(0, 1).to(cache.dtype)

    def batch(self, items: dict[int, Item]) -> ForwardBatch:
        sizes = {"window": self.layer.window, "block_size": self.block_size}
        plan = [scheduled(item, released(item, self.tables[index], **sizes)) for index, item in items.items()]
        return build_forward_batch(plan, self.block_size, torch.device("cpu"))

    def rows(self, items: dict[int, Item]) -> list[Tensor]:
        """This step's queries, keys and values."""
        parts = []
        for x in (self.q, self.k, self.v):
            parts.append(torch.cat([x[i][item.num_computed : item.num_tokens] for i, item in items.items()]))
        return parts

    def attend(self, items: dict[int, Item], *, num_threads: int = 1) -> list[Tensor]:
        """Runs these sequences as one batch; each one's rows."""
        batch = self.batch(items)
        attention = make_attention(self.cache, [self.layer], num_threads)
        attention.plan(batch)
        out = attention(*self.rows(items), self.layer, batch)
        return list(out.split([item.num_new for item in items.values()]))

    def oracle(self, items: dict[int, Item]) -> Tensor:
        """From what is in the cache now."""
        q, _, _ = self.rows(items)
        return attention_batches.attend_in_float64(q, *rows_of(self.cache, 0), self.layer, self.batch(items))


def rows_of(cache: KVCache, index: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, [num_kv_heads, num_blocks, block_size, head_dim] both."""
    return cache.k[index].transpose(2, 3), cache.v[index]


def make_attention(cache: KVCache, layers: list[AttentionLayer], num_threads: int = 1) -> NumbaAttention:
    return NumbaAttention(cache, Team(num_threads, scratch_bytes=scratch_bytes(layers)))


def random_layer(rng: random.Random) -> AttentionLayer:
    num_kv_heads, group = rng.choice(
        [(1, 1), (1, 8), (2, 2), (3, 3), (2, 4), (1, 5), (3, 6), (1, 7), (1, TILE_ROWS + 2)]
    )
    return AttentionLayer(
        index=0,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=rng.choice([16, 64, 80, 96, 128]),
        scale=rng.uniform(0.05, 0.4),
        window=rng.choice([None, None, 1, rng.randrange(2, 100), rng.randrange(100, 300)]),
        soft_cap=rng.choice([None, None, rng.uniform(1, 30)]),
    )


def assert_close(outputs: list[Tensor], expected: Tensor) -> None:
    """What the torch back end is held to: sums in float32 of up to a few hundred weights."""
    torch.testing.assert_close(torch.cat(outputs).double(), expected, rtol=1e-4, atol=1e-5)


def check(
    layer: AttentionLayer, items: list[Item], *, block_size: int, dtype: torch.dtype, num_threads: int = 1
) -> None:
    texts = Texts(layer, [item.num_tokens for item in items], block_size=block_size, dtype=dtype)
    for index, item in enumerate(items):
        texts.store(index, item.num_computed)
    step = dict(enumerate(items))
    assert_close(texts.attend(step, num_threads=num_threads), texts.oracle(step))


@pytest.mark.parametrize("seed", range(60))
def test_any_batch_equals_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    num_items, trees = rng.randrange(1, 7), seed % 2 == 0
    items = [attention_batches.random_item(rng, rng.choice(LENGTHS), most=80, trees=trees) for _ in range(num_items)]
    block_size, dtype = rng.choice([16, 32, 48, 64, 256]), DTYPES[seed % 3]
    check(random_layer(rng), items, block_size=block_size, dtype=dtype, num_threads=rng.choice([1, 3]))


@pytest.mark.parametrize("num_computed", [SPAN - 2, SPAN - 1, SPAN, SPAN + 1, 1000])
@pytest.mark.parametrize("window", [None, SPAN - 1, SPAN, SPAN + 1])
def test_contexts_that_end_at_a_span_s_border(window: int | None, num_computed: int) -> None:
    layer = AttentionLayer(0, 4, 2, 64, 0.125, window=window)
    items = [Item(num_computed, 1), Item(num_computed, 2), Item(num_computed, 4, (-1, 0, 1))]
    check(layer, items, block_size=32, dtype=torch.float16)


def test_a_whole_prompt_of_several_spans() -> None:
    layer = AttentionLayer(0, 6, 2, 32, 0.2)
    check(layer, [Item(0, 3 * SPAN + 5), Item(0, SPAN)], block_size=16, dtype=torch.float32)
    check(replace(layer, window=70), [Item(0, 3 * SPAN + 5)], block_size=16, dtype=torch.float32)


def test_a_sibling_s_window_may_begin_before_that_of_the_draft_before_it() -> None:
    layer = AttentionLayer(0, TILE_ROWS // 2, 1, 16, 0.25, window=20)  # two tokens are a unit of work
    num_computed = SPAN + layer.window - 3  # where the windows of drafts 1 and 2 begin in different spans
    check(layer, [Item(num_computed, 4, (-1, 0, -1))], block_size=16, dtype=torch.float32)


def random_steps(rng: random.Random, lengths: list[int], *, most: int) -> list[dict[int, Item]]:
    """Ways to compute all of the sequences: chunks, single tokens and chains of drafts, in mixed batches."""
    done, steps = [0] * len(lengths), []
    while unfinished := [i for i, length in enumerate(lengths) if done[i] < length]:
        step = {}
        for i in rng.sample(unfinished, rng.randint(1, len(unfinished))):
            num_new = min(lengths[i] - done[i], rng.choice([1, rng.randint(2, 5), rng.randint(1, most)]))
            num_drafts = rng.randrange(num_new) if rng.random() < 0.5 else 0
            step[i] = Item(done[i], num_new, tuple(range(-1, num_drafts - 1)))
            done[i] += num_new
        steps.append(step)
    return steps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 30, 150, 200])  # windows of one span and of several
def test_a_row_has_the_same_bits_in_any_batch_and_any_chunk(window: int | None, dtype: torch.dtype) -> None:
    rng = random.Random(window or 0)
    lengths = [rng.choice([1, 20, SPAN - 1, SPAN, SPAN + 1]) for _ in range(4)] + [300, 400]
    layer = replace(random_layer(rng), window=window)
    texts = Texts(layer, lengths, block_size=rng.choice([16, 32]), dtype=dtype)
    alone = [texts.attend({i: Item(0, length)})[0] for i, length in enumerate(lengths)]
    for most in (40, 200):
        texts.cache.kv[0].fill_(math.nan)
        rows: list[list[Tensor]] = [[] for _ in lengths]
        for step in random_steps(rng, lengths, most=most):
            for i, out in zip(step, texts.attend(step, num_threads=rng.choice([1, 2])), strict=True):
                rows[i].append(out)
        for parts, whole in zip(rows, alone, strict=True):
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("window", [None, 30])
def test_a_neighbour_that_is_not_a_number_stays_alone(window: int | None) -> None:
    items = dict(enumerate([Item(140, 1), Item(70, 1), Item(40, 3, (-1, 0)), Item(5, 130)]))
    layer = AttentionLayer(0, 4, 2, 32, 0.2, window=window)
    texts = Texts(layer, [item.num_tokens for item in items.values()])
    for index, item in items.items():
        texts.store(index, item.num_computed)
    healthy = texts.attend(items)
    for x in (texts.q, texts.k, texts.v):
        x[1].fill_(math.nan)
    texts.store(1, 70)
    poisoned = texts.attend(items)
    assert poisoned[1].isnan().all()
    for i in (0, 2, 3):
        assert healthy[i].isfinite().all()
        assert torch.equal(poisoned[i], healthy[i])


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_large_scores_do_not_overflow(soft_cap: float | None) -> None:
    layer = AttentionLayer(0, 4, 2, 16, 1.0, soft_cap=soft_cap)
    texts = Texts(layer, [200])
    texts.q[0] *= 1000.0  # scores of thousands: one key takes all, or a few where they are capped
    texts.store(0, 150)
    step = {0: Item(150, 50)}
    # float32 rounds a score of 8,000 by 2^-12, and weights follow by that much of themselves
    torch.testing.assert_close(texts.attend(step)[0].double(), texts.oracle(step), rtol=1e-3, atol=5e-3)


def test_layers_with_different_windows_and_norms_share_a_step() -> None:
    full = AttentionLayer(0, 4, 2, 32, 0.2)
    layers = [full, replace(full, index=1, window=8), AttentionLayer(2, 2, 2, 64, 0.2)]
    cache = KVCache(layers, num_blocks=8, block_size=16, dtype=torch.float32, keys_as_columns=True)
    attention = make_attention(cache, layers)
    for num_computed in (0, 40):  # the second step must not see the plan of the first
        item = Item(num_computed, 40 if num_computed == 0 else 1)
        batch = build_forward_batch([scheduled(item, [3, 1, 6])], 16, torch.device("cpu"))
        attention.plan(batch)
        for layer in layers:
            q = torch.randn(item.num_new, layer.num_heads, layer.head_dim)
            k, v = torch.randn(2, item.num_new, layer.num_kv_heads, layer.head_dim)
            out = attention(q, k, v, layer, batch)
            assert_close([out], attention_batches.attend_in_float64(q, *rows_of(cache, layer.index), layer, batch))
