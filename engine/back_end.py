"""What `device.kernels` stands for: how weights are packed, who runs the layers, who samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import cast

import torch

from engine.attention import ATTENTION_BACKENDS, AttentionBackend
from engine.kv_cache import KVCache
from engine.linear import prepare_linears
from engine.model_runner import ModelRunner
from engine.models.llama import Llama
from engine.models.model import Model
from engine.models.operations import load_operations
from engine.one_token_runner import OneTokenRunner
from engine.places import load_object
from engine.planner import MemoryPlan
from engine.sampler import SAMPLERS, TokenSampler


@dataclass(frozen=True, slots=True)
class BackEnd:
    """The parts of an engine that depend on the kernels. is_strict: `device.determinism`

    A module is imported when its kernels are wanted: one compiles, the other needs a package of its own.
    """

    plan: MemoryPlan
    is_strict: bool

    def compile(self) -> None:
        """Compiles the CPU's kernels, or reads what was compiled before."""
        import_module("engine.numba_runner")

    def prepare(self, model: Model) -> None:
        """Packs the weights, in place, and gives the model its operations. Leaves torch the threads that it may use."""
        plan = self.plan
        if plan.kernels == "numba":
            from engine.linear_numba import pack_linears

            torch.set_num_threads(1)  # ours multiply; its own would spin beside them
            pack_linears(model, plan.quantization, num_threads=plan.num_threads)
            return
        model.operations = load_operations(plan.kernels)
        prepare_linears(model, plan.quantization, num_threads=plan.num_threads)
        if self._fixes_rows and isinstance(model, Llama):
            from engine.fixed_rows import fix_rows

            fix_rows(model)

    def make_attention(self, cache: KVCache) -> AttentionBackend:
        """Torch's or Triton's attention over a cache."""
        if self._fixes_rows:
            from engine.attention_triton import TritonAttention

            return TritonAttention(cache, one_path=True)
        make = cast(Callable[[KVCache], AttentionBackend], load_object(ATTENTION_BACKENDS[self.plan.kernels]))
        return make(cache)

    def make_runner(self, model: Model, cache: KVCache) -> ModelRunner:
        plan = self.plan
        if plan.kernels == "numba":  # strict or not: there, a row's result depends on nothing but the row
            from engine.numba_runner import make_numba_runner

            return make_numba_runner(model, cache, plan)
        if self.is_strict and not (self._fixes_rows and isinstance(model, Llama)):
            return OneTokenRunner(model, cache, self.make_attention(cache), block_size=plan.block_size)
        if plan.graphs.total:
            from engine.gpu_runner import make_gpu_runner
            from engine.graph_runner import CudaGraphDevice

            return make_gpu_runner(model, cache, plan, CudaGraphDevice(), one_path=self.is_strict)
        return ModelRunner(model, cache, self.make_attention(cache), block_size=plan.block_size)

    def make_sampler(self, vocab_size: int) -> TokenSampler:
        make = cast(Callable[[int], TokenSampler], load_object(SAMPLERS[self.plan.kernels]))
        return make(vocab_size)

    @property
    def _fixes_rows(self) -> bool:
        """Whether strict determinism comes from products of one shape, for models whose products we know: on a GPU."""
        return self.is_strict and self.plan.kernels == "triton" and self.plan.device == "cuda"
