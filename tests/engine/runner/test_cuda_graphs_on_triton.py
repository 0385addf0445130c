"""CUDA graphs over Triton's attention: one plan serves all lengths, and where there is a GPU, its graphs do."""

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.attention.triton_backend import TritonAttention, make_graph_space
from engine.batch.device_inputs import BatchBuilder
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.layer_spec import windows_of
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.runner.cuda_graphs import CudaGraphDevice, GraphDevice, GraphLimits, GraphRunner
from engine.runner.model_runner import ModelRunner
from engine.sampling.host_sampler import HostSampler
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.speculation.ngram import NgramProposer
from engine.speculation.no_proposer import NoProposer
from kernels.triton.attention.paged_attention import Prepared, paged_attention
from kernels.triton.attention.work_partition import Workspace, partition_any_lengths, partition_attention
from kernels.triton.configs import AttentionConfig
from tests.support.stepping import engine_of
from tests.support.tiny_llamas import COST, VOCAB_SIZE, answer_three, make_model

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")
SMALL = AttentionConfig(split_size=64, max_split_queries=8, decode_keys=32)


def _run(model_name: str, device: torch.device, graph_device: GraphDevice | None, *, num_drafts: int = 0) -> object:
    """The output tokens of a few requests, with graphs where there is something that makes them."""
    model = make_model(model_name).to(device)
    cache = KVCache(model.attention_layers, num_blocks=60, block_size=4, codec=DenseCodec(torch.float32), device=device)
    space = make_graph_space(model.attention_layers, torch.float32, device, max_context=60, num_bytes=1 << 16)
    attention, builder = TritonAttention(cache, graph_space=space), BatchBuilder(device)
    graphs = None
    if graph_device is not None:
        limits = GraphLimits(
            max_num_seqs=4, max_rows_per_seq=1 + num_drafts, max_num_blocks=15, num_uses=0,
            num_steps_between=0, num_groups=len(windows_of(model.attention_layers)),
        )  # fmt: skip
        graphs = GraphRunner(model, attention, builder, limits=limits, graph_device=graph_device, device=device)
    runner = ModelRunner(model, cache, attention, builder=builder, graphs=graphs)
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=60, headroom=4)
    kv = KVCacheManager(60, 4, windows=windows_of(model.attention_layers))
    proposer = NgramProposer(num_drafts=num_drafts, ngram_max=3, ngram_min=1) if num_drafts else NoProposer()
    engine = engine_of(runner, Scheduler(kv, limits), HostSampler(VOCAB_SIZE), proposer, COST, overlap=not num_drafts)
    return answer_three(engine)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures on a GPU")
@pytest.mark.parametrize(("model", "num_drafts"), [("full", 0), ("window", 3), ("mixed", 0)])
def test_the_engine_says_the_same_with_real_graphs(device: torch.device, model: str, num_drafts: int) -> None:
    graphs = CudaGraphDevice()
    assert _run(model, device, graphs, num_drafts=num_drafts) == _run(model, device, None, num_drafts=num_drafts)


def _attend(device: torch.device, lens: list[tuple[int, int]], *, num_seqs: int, rows_per_seq: int | None) -> Tensor:
    """What the rows of a batch of (new tokens, all tokens) get: by a plan for any lengths, or by one for these."""
    generator = torch.Generator().manual_seed(0)
    num_blocks, block_size = 40, 16
    kv = torch.randn(2, num_blocks, 2, block_size, 64, generator=generator).to(device)
    tables = torch.zeros(num_seqs, 12, dtype=torch.int64)
    first = 1
    for b, (_, length) in enumerate(lens):
        num_used = -(-length // block_size)
        tables[b, :num_used] = torch.arange(first, first + num_used)
        first += num_used
    padding = [(0, 0)] * (num_seqs - len(lens))
    num_new = np.array([new for new, _ in lens + padding])
    seq_lens = np.array([length for _, length in lens + padding])
    q = torch.randn(40, 4, 64, generator=generator)[: num_new.sum() + 3].to(device)  # three rows are nobody's
    shape = {"group": 2, "num_kv_heads": 2, "config": SMALL, "device": device}
    if rows_per_seq is None:
        partition = partition_attention(num_new, seq_lens, **shape)
    else:
        made = partition_any_lengths(num_seqs, rows_per_seq, max_context=192, num_partials=100, **shape)
        partition = made.at(torch.from_numpy(seq_lens).to(device))
    starts = torch.from_numpy(np.concatenate(([0], num_new.cumsum()))).to(device)
    out = paged_attention(
        q, kv[0], kv[1], tables.to(device), starts, torch.from_numpy(seq_lens).to(device), 0.2,
        prepared=Prepared(partition, SMALL, Workspace(0, 0, device)),
    )  # fmt: skip
    return out[: num_new.sum()]


@pytest.mark.parametrize("lens", [[(1, 1), (1, 130), (1, 64)], [(3, 70), (1, 129), (5, 66)], [(5, 192), (2, 3)]])
def test_a_partition_for_any_lengths_changes_no_bit(device: torch.device, lens: list[tuple[int, int]]) -> None:
    expected = _attend(device, lens, num_seqs=len(lens), rows_per_seq=None)
    assert not expected.isnan().any()
    found = _attend(device, lens, num_seqs=5, rows_per_seq=6)
    assert torch.equal(found, expected)


def test_contexts_that_need_more_room_than_there_is_are_refused() -> None:
    cpu = torch.device("cpu")
    model = make_model("full")
    item_bytes = 4 * 3 * (16 + 1)  # a value and a sum of each head
    space = make_graph_space(model.attention_layers, torch.float32, cpu, max_context=2000, num_bytes=12 * item_bytes)
    cache = KVCache(model.attention_layers, num_blocks=4, block_size=4, codec=DenseCodec(torch.float32))
    attention = TritonAttention(cache, graph_space=space)
    assert attention.has_room(np.array([256, 256, 500]), 3)  # pieces of 256 tokens: four, thrice
    assert not attention.has_room(np.array([256, 257, 500]), 3)
    assert attention.has_room(np.array([2000, 0]), 1)
    assert not attention.has_room(np.array([2001, 0]), 1)
    assert not attention.has_room(np.array([5]), 17)  # they would go the way of prompts
    assert not TritonAttention(cache).has_room(np.array([5]), 1)
