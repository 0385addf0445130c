"""CUDA graphs without CUDA: a fake records the work and repeats it on the inputs that lie where they lay.

So whatever the host would have to tell a real graph anew (a length, a table, a token) is stale here too, and what
comes out of padding is not a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine.attention.torch_backend import TorchAttention
from engine.batch.device_inputs import BatchBuilder, ForwardBatch
from engine.engine import Engine
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.layer_spec import AttentionLayer, windows_of
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.runner.cuda_graphs import GraphLimits, GraphRunner
from engine.runner.model_runner import ModelRunner
from engine.sampling.host_sampler import HostSampler
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.speculation.ngram import NgramProposer
from engine.speculation.no_proposer import NoProposer
from kernels.reference.attention import paged_attention, store_kv
from tests.support.stepping import engine_of
from tests.support.tiny_llamas import COST, VOCAB_SIZE, make_model

BLOCK_SIZE = 4


class FakeGraph:
    def __init__(self, work: Callable[[], Tensor], output: Tensor) -> None:
        self._work, self._output = work, torch.full_like(output, math.nan)
        self.num_replays = 0

    def replay(self) -> Tensor:
        self.num_replays += 1
        return self._output.copy_(self._work())


class FakeGraphDevice:
    """Captures until it has made `max_num_captures` graphs, and fails from then on."""

    def __init__(self, max_num_captures: int = 1000) -> None:
        self.graphs: list[FakeGraph] = []
        self.num_rows: list[int] = []  # of each capture that was tried
        self.max_num_captures = max_num_captures

    def capture(self, work: Callable[[], Tensor]) -> FakeGraph:
        output = work()
        self.num_rows.append(len(output))
        if len(self.num_rows) > self.max_num_captures:
            raise RuntimeError("this operation waits for the device")
        self.graphs.append(FakeGraph(work, output))
        return self.graphs[-1]

    @property
    def num_replays(self) -> int:
        return sum(graph.num_replays for graph in self.graphs)


class DefinedAttention(TorchAttention):
    """Captured steps attend as the definition does: by the tensors of the batch alone."""

    max_context = 1000
    is_captured = False

    def plan(self, batch: ForwardBatch) -> None:
        self.is_captured = False
        super().plan(batch)

    def plan_any_lengths(self, batch: ForwardBatch, rows_per_seq: int) -> None:
        self.is_captured = True
        assert int(batch.query_starts.diff().max()) <= rows_per_seq

    def has_room(self, seq_lens, rows_per_seq: int) -> bool:
        return seq_lens.max() <= self.max_context

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> Tensor:
        if not self.is_captured:
            return super().__call__(q, k, v, layer, batch)
        k_cache, v_cache = self.kv_cache.k[layer.index], self.kv_cache.v[layer.index]
        slots = batch.slots[layer.group]
        kept = slots >= 0
        store_kv(k[kept], v[kept], k_cache, v_cache, slots[kept])
        num_rows = int(batch.query_starts[-1])
        out = torch.full_like(q, math.nan)
        out[:num_rows] = paged_attention(
            q[:num_rows], k_cache, v_cache, batch.block_tables[layer.group], batch.query_starts, batch.seq_lens,
            layer.scale,
            window=layer.window,
        )  # fmt: skip
        return out


class Setup:
    """A tiny model with graphs, and without them where `device` is None."""

    def __init__(self, name: str, device: FakeGraphDevice | None, max_rows_per_seq: int = 1, **limits: int) -> None:
        self.model = make_model(name)
        self.cache = KVCache(
            self.model.attention_layers, num_blocks=400, block_size=BLOCK_SIZE, codec=DenseCodec(torch.float32)
        )
        self.attention = DefinedAttention(self.cache)
        self.builder = BatchBuilder(torch.device("cpu"))
        self.graphs: GraphRunner | None = None
        if device is not None:
            num_groups = len(windows_of(self.model.attention_layers))
            defaults = {"max_num_seqs": 6, "max_num_blocks": 20, "num_groups": num_groups, "num_uses": 0}
            merged = {**defaults, "num_steps_between": 0, "max_rows_per_seq": max_rows_per_seq, **limits}
            self.graphs = GraphRunner(
                self.model,
                self.attention,
                self.builder,
                limits=GraphLimits(**merged),
                graph_device=device,
                device=torch.device("cpu"),
            )
        self.runner = ModelRunner(self.model, self.cache, self.attention, builder=self.builder, graphs=self.graphs)

    def engine(self, *, has_drafts: bool = False, overlap: bool = False) -> Engine:
        limits = SchedulerLimits(max_num_seqs=6, max_num_batched_tokens=40, max_model_len=70, headroom=1)
        windows = windows_of(self.model.attention_layers)
        scheduler = Scheduler(KVCacheManager(24 * len(windows), BLOCK_SIZE, windows=windows), limits)
        proposer = NgramProposer(num_drafts=3, ngram_min=1, ngram_max=2) if has_drafts else NoProposer()
        return engine_of(self.runner, scheduler, HostSampler(VOCAB_SIZE), proposer, COST, overlap=overlap)
