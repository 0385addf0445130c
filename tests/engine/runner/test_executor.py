"""Executors of every kind keep the laws that a host relies on."""

from __future__ import annotations

import torch
from transformers import Qwen2Config

from engine.attention.numba_backend import NumbaAttention, scratch_bytes
from engine.attention.torch_backend import TorchAttention
from engine.attention.triton_backend import TritonAttention
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.layer_spec import windows_of
from engine.kv_cache.storage import KVCache
from engine.models.llama import Llama
from engine.models.llama_numba import NumbaLlama
from engine.models.model import Model
from engine.models.registry import build_model
from engine.quantization.linear import exchange_linears
from engine.quantization.method import COMPILED_FORMATS, make_methods
from engine.runner.executor import ModelExecutor
from engine.runner.model_runner import ModelRunner
from engine.runner.strict_runner import OneTokenRunner
from engine.sampling.host_sampler import HostSampler
from engine.sampling.sampler import TokenSampler
from engine.sampling.triton_sampler import TritonSampler
from kernels.numba.program.team import Team
from tests.support.conformance.executor import NUM_BLOCKS, VOCAB_SIZE, ExecutorConformance
from tests.support.recorded_graphs import FakeGraphDevice, Setup
from tests.support.tiny_llamas import make_model

BLOCK_SIZE = 4
Made = tuple[ModelExecutor, list[int | None], int]


def make_cache(model: Model, block_size: int = BLOCK_SIZE, *, keys_as_columns: bool = False) -> KVCache:
    layers = model.attention_layers
    codec = DenseCodec(torch.float32, keys_as_columns=keys_as_columns)
    num_blocks = NUM_BLOCKS * len(windows_of(layers))
    return KVCache(layers, num_blocks=num_blocks, block_size=block_size, codec=codec)


def made(runner: ModelRunner, sampler: TokenSampler | None = None) -> Made:
    executor = ModelExecutor(runner, sampler or HostSampler(VOCAB_SIZE))
    return executor, windows_of(runner.model.attention_layers), runner.kv_cache.block_size


class TestTorch(ExecutorConformance):
    """Layers of both kinds, with a window and without."""

    def make(self) -> Made:
        model = make_model("mixed")
        cache = make_cache(model)
        return made(ModelRunner(model, cache, TorchAttention(cache)))


class TestTorchThatShowsLayers(TestTorch):
    def make(self) -> Made:
        executor, windows, block_size = super().make()
        executor.runner.model.show_inputs_of((1, 0))
        return executor, windows, block_size


class TestOneTokenAtATime(ExecutorConformance):
    accepts_trees = False

    def make(self) -> Made:
        model = make_model("mixed")
        cache = make_cache(model)
        return made(OneTokenRunner(model, cache, TorchAttention(cache)))


class TestGraphs(ExecutorConformance):
    def make(self) -> Made:
        return made(Setup("mixed", FakeGraphDevice(), max_rows_per_seq=4, max_num_blocks=30).runner)


class TestTriton(ExecutorConformance):
    """In the interpreter where there is no GPU."""

    def make(self) -> Made:
        model = make_model("window")
        cache = make_cache(model)
        return made(ModelRunner(model, cache, TritonAttention(cache)), TritonSampler(VOCAB_SIZE))


class TestCompiled(ExecutorConformance):
    num_threads = 2
    compares_hidden = 0.0

    def make(self) -> Made:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
        windows = {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
        model = build_model(Qwen2Config(**sizes, **windows, vocab_size=VOCAB_SIZE), dtype=torch.float32)
        assert isinstance(model, Llama)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        exchange_linears(model, make_methods(COMPILED_FORMATS, "none"))
        cache = make_cache(model, 16, keys_as_columns=True)
        team = Team(self.num_threads, scratch_bytes=scratch_bytes(model.attention_layers, cache.block_size))
        attention = NumbaAttention(cache, team)
        return made(ModelRunner(NumbaLlama(model, attention, team), cache, attention))
