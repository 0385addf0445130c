"""Overflow of a float16 KV cache: a bound of the keys and values, and a wider cache where they could exceed it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.ipc.messages import Setting
from engine.models.llama import Block, Llama
from engine.models.model import Model
from engine.planning.engine_plan import MemoryPlan, PlanError, plan_memory
from engine.planning.machine import Machine

FLOAT16_MAX = torch.finfo(torch.float16).max


@torch.no_grad()
def bound_of_keys_and_values(model: Model) -> float:
    """An upper bound of the magnitude of any key or value, for any input; 0 for layers that are not our own.

    A normalised row has a length of sqrt(hidden size) before its weights, so its product with a row of the matrix is
    at most that times the row's length (Cauchy, Schwarz). A rotation mixes two elements. Of packed matrices, it is what
    they hold that counts.
    """
    if not isinstance(model, Llama):
        return 0.0
    return max(_bound_of_block(model, block) for block in model.blocks())


def _bound_of_block(model: Llama, block: Block) -> float:
    attention, layer = block.self_attn, block.self_attn.layer
    num_queries, num_keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    rows = attention.qkv_proj.dense(slice(num_queries, None)).float() * block.input_layernorm.weight.float()
    bounds = rows.norm(dim=1) * model.hidden_size**0.5
    if attention.qkv_proj.bias is not None:
        bounds += attention.qkv_proj.bias[num_queries:].float().abs()
    keys, values = _largest(bounds[:num_keys]), _largest(bounds[num_keys:])
    if attention.k_norm is not None:
        weight = attention.k_norm.weight.float()
        keys = _largest(weight) * weight.numel() ** 0.5
    if block.rope_index is not None:
        keys *= 2**0.5 * model.architecture.ropes[block.rope_index].scale
    return max(keys, values)


def _largest(numbers: Tensor) -> float:
    return float(numbers.abs().max())


def with_cache_that_holds(plan: MemoryPlan, bound: float, config: EngineConfig, machine: Machine) -> MemoryPlan:
    """The plan with a cache of float32 where float16 could not hold `bound`; of bfloat16 where that has no room.

    A `kv_cache.dtype` that is set is kept. machine: as it was before the model was loaded
    """
    if plan.kv_dtype != torch.float16 or bound <= FLOAT16_MAX or config.kv_cache.dtype != "auto":
        return plan
    why = _why(bound)
    cache = config.kv_cache.model_copy(update={"dtype": "float32"})
    try:
        wide = plan_memory(plan.facts, config.model_copy(update={"kv_cache": cache}), machine)
    except PlanError:
        settings = plan.settings | {"kv_cache.dtype": Setting("bfloat16", "measured", why)}
        return replace(plan, kv_codec="bfloat16", settings=settings)
    settings = wide.settings | {"kv_cache.dtype": Setting("float32", "measured", why)}
    return replace(wide, model_config=plan.model_config, settings=settings)


def overflow_note(plan: MemoryPlan, bound: float) -> str | None:
    """A warning for a `kv_cache.dtype` that was set and may overflow."""
    if plan.kv_dtype != torch.float16 or bound <= FLOAT16_MAX:
        return None
    return f"kv_cache.dtype is float16, but {_why(bound)}: a text that gets there fails; auto takes float32"


def _why(bound: float) -> str:
    return f"keys or values may reach {bound:,.0f}, and float16 ends at {FLOAT16_MAX:,.0f}"
