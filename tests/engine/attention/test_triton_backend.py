"""Attention by Triton's kernels; with one path, a row's bits do not depend on its chunk either."""

import numpy as np
import pytest
import torch

from engine.attention.triton_backend import TritonAttention
from engine.batch.device_inputs import BatchBuilder
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.layer_spec import AttentionLayer
from engine.kv_cache.storage import KVCache
from engine.runner.step_builder import StepBuilder
from engine.types import Request, SamplingParams, Scheduled, Sequence
from kernels.triton import configs
from tests.support.conformance.attention import AttentionConformance

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")
CONTEXT, BLOCK_SIZE = 21, 16
SMALL = configs.AttentionConfig(
    split_size=32, max_split_queries=8, decode_rows=16, decode_keys=32, prompt_rows=32, prompt_keys=32
)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in the interpreter, to what is right
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
class TestTritonAttention(AttentionConformance):
    num_random_batches = 4
    num_shuffles = 1
    rounds_queries_to_the_cache = True
    head_dims = (32, 64)
    contexts = (0, 1, 17, 40)
    longest_chunk = 20

    @pytest.fixture(autouse=True)
    def _small_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engine.attention.triton_backend.attention_config", lambda *sizes, **facts: SMALL)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def make(self, cache: KVCache) -> TritonAttention:
        return TritonAttention(cache)


class TestTritonAttentionOverInt8(TestTritonAttention):
    kept_as = torch.int8
    stores_what_torch_rounds = False
    precisions = ((torch.float32, torch.int8), (torch.bfloat16, torch.int8))


class TestTritonAttentionOverFp8(TestTritonAttention):
    kept_as = torch.float8_e4m3fn
    stores_what_torch_rounds = False
    precisions = ((torch.float32, torch.float8_e4m3fn), (torch.float16, torch.float8_e4m3fn))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    ("num_heads", "chunkings"),
    [  # the interpreter's products depend on a row's place in its tile, so that must not change here
        (16, ([16, 1, 3, 1],)),  # a tile per query
        (2, ([8, 13], [16, 5])),  # eight queries a tile
    ],
)
def test_a_chunk_has_the_bits_of_smaller_chunks(
    device: torch.device,
    num_heads: int,
    chunkings: tuple[list[int], ...],
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = configs.AttentionConfig(
        split_size=8, max_split_queries=4, decode_rows=16, decode_keys=8, prompt_rows=32, prompt_keys=32
    )
    monkeypatch.setattr("engine.attention.triton_backend.attention_config", lambda *sizes, **facts: small)
    layer = AttentionLayer(0, num_heads=num_heads, num_kv_heads=1, head_dim=16, scale=0.25, window=window)
    rows = [torch.randn(CONTEXT, heads, 16, device=device) for heads in (num_heads, 1, 1)]
    params = SamplingParams(seed=0, max_tokens=9)
    request = Request(request_id="r", prompt_token_ids=[1] * CONTEXT, params=params)

    def attend(chunks: list[int], *, one_path: bool) -> torch.Tensor:
        cache = KVCache([layer], num_blocks=7, block_size=BLOCK_SIZE, codec=DenseCodec(torch.float32), device=device)
        attention = TritonAttention(cache, one_path=one_path)
        inputs, builder = StepBuilder(BLOCK_SIZE, vocab_size=64), BatchBuilder(device)
        seq = Sequence(request, [1] * CONTEXT, block_tables=[[3, 1]])
        outputs = []
        for size in chunks:
            batch = builder.build(inputs.build([Scheduled(seq, size, 0, samples=False)]))
            attention.plan(batch)
            start = seq.num_computed_tokens
            outputs.append(attention(*(part[start : start + size] for part in rows), layer, batch).clone())
            seq.num_computed_tokens += size
        return torch.cat(outputs)

    whole = attend([CONTEXT], one_path=True)
    for chunks in chunkings:
        assert sum(chunks) == CONTEXT
        assert torch.equal(attend(chunks, one_path=True), whole)
    item_bytes = 4 * num_heads * (16 + 1)
    monkeypatch.setattr(
        "engine.attention.triton_backend.ITEM_BYTES", 30 * item_bytes
    )  # three chunks: there are 63 partials
    assert torch.equal(attend([CONTEXT], one_path=True), whole)
    usual = attend([CONTEXT], one_path=False)
    np.testing.assert_allclose(usual.cpu(), whole.cpu(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(usual, whole)
