"""An engine on a device that is lost on order, for tests of the process border: a real one, but for its model runner.

Loaded by its path in the child process. The config's model path is a directory: the device of the first process is lost
in its sixth step, and of no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from engine.attention.torch_backend import TorchAttention
from engine.batch.step_inputs import StepInputs
from engine.config import EngineConfig
from engine.engine import Engine
from engine.ipc.messages import ModelInfo, TokenizerAssets
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.models.registry import build_model
from engine.runner.model_runner import ModelRunner
from engine.runner.step_builder import StepBuilder
from engine.sampling.host_sampler import HostSampler
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_stats import ModelCost
from engine.speculation.no_proposer import NoProposer
from engine.types import Scheduled
from tests.support.stepping import engine_of

VOCAB_SIZE = 64
COST = ModelCost(weight_bytes=1, flops_per_token=1, kv_bytes_per_token=1, attention_flops_per_pair=1)


class WatchedBuilder(StepBuilder):
    """Remembers the plan that it built inputs from."""

    batch: Sequence[Scheduled] = ()

    def build(self, batch: list[Scheduled]) -> StepInputs:
        self.batch = batch
        return super().build(batch)


class FaultyRunner(ModelRunner):
    """Calls `before` with the plan that inputs were built from last; it may raise."""

    watched: WatchedBuilder
    before: Callable[[list[Scheduled]], None] = staticmethod(lambda batch: None)

    def forward(self, inputs: StepInputs, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.before(self.watched.batch)
        return super().forward(inputs, tokens)


def make_engine(*, overlap: bool = False, proposer=None, num_blocks: int = 100) -> Engine:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=128,
    )
    model = build_model(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    cache = KVCache(model.attention_layers, num_blocks=num_blocks, block_size=4, codec=DenseCodec(torch.float32))
    limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=100)
    runner = FaultyRunner(model, cache, TorchAttention(cache))
    kv = KVCacheManager(num_blocks, 4)
    proposer = proposer or NoProposer()
    engine = engine_of(runner, Scheduler(kv, limits), HostSampler(VOCAB_SIZE), proposer, COST, overlap=overlap)
    engine.builder.__class__ = WatchedBuilder
    runner.watched = engine.builder
    return engine


def lose_device() -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with more checks")


def build(config: EngineConfig, report: Callable[[str, str], None]) -> tuple[Engine, ModelInfo]:
    torch.set_num_threads(1)
    engine = make_engine()
    marker, steps = Path(config.model.path) / "lost", []
    is_first = not marker.exists()
    marker.touch()

    def before(batch: list[Scheduled]) -> None:
        steps.append(len(batch))
        if is_first and len(steps) > 5:
            lose_device()

    engine.executor.runner.before = before
    model = ModelInfo(
        path=config.model.path,
        architecture="Llama",
        num_parameters=0,
        vocab_size=VOCAB_SIZE,
        trained_context=100,
        max_model_len=100,
        num_kv_tokens=400,
        eos_token_ids=[],
        generation_defaults={},
        tokenizer=TokenizerAssets(tokenizer_json="{}", chat_template=None, special_tokens={}),
        fingerprint="fp_faulty",
        settings={},
        phase_seconds={},
        bytes_per_second=0,
        flops_per_second=0,
    )
    return engine, model
