"""The parts of a CPU engine whose layers are compiled, put together."""

from __future__ import annotations

from engine.attention_numba import NumbaAttention, scratch_bytes
from engine.kv_cache import KVCache
from engine.model_runner import ModelRunner
from engine.models.llama import Llama
from engine.models.llama_numba import NumbaLlama
from engine.models.model import Model
from engine.planner import MemoryPlan
from kernels.numba.team import Team


def make_numba_runner(model: Model, cache: KVCache, plan: MemoryPlan) -> ModelRunner:
    """A runner of a packed Llama. Leave torch one thread: its others would spin beside ours."""
    assert isinstance(model, Llama), "the plan says what can be compiled"
    attention = make_numba_attention(model, cache, plan)
    return ModelRunner(NumbaLlama(model, attention, attention.team), cache, attention, block_size=plan.block_size)


def make_numba_attention(model: Model, cache: KVCache, plan: MemoryPlan) -> NumbaAttention:
    return NumbaAttention(cache, Team(plan.num_threads, scratch_bytes=scratch_bytes(model.attention_layers)))
