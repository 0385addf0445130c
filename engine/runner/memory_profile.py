"""How much memory the largest step takes, measured once, before the cache gets what is left.

The plan's estimate cannot know what libraries allocate for themselves, so on a GPU one step is run first: as many
tokens as a step may have, in as many sequences as may run, all of whom are sampled, and as many rows of logits as a
step may have, the rest of which score prompts. Its keys go to a single block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import msgspec
import torch

from engine.attention.backend import AttentionBackend
from engine.config import EngineConfig
from engine.kv_cache.block_pool import NULL_BLOCK
from engine.kv_cache.codec import make_codec
from engine.kv_cache.storage import KVCache
from engine.models.model import Model
from engine.planning.engine_plan import MemoryPlan, plan_memory
from engine.planning.machine import Machine
from engine.runner.executor import ModelExecutor
from engine.runner.model_runner import ModelRunner
from engine.runner.step_builder import StepBuilder
from engine.sampling.sampler import TokenSampler
from engine.types import Request, SamplingParams, Scheduled, Sequence

PARAMS = SamplingParams(
    seed=0, max_tokens=1, temperature=1.0, top_p=0.9, presence_penalty=0.1, logprobs=5, prompt_logprobs=5
)


class MemoryMeter(Protocol):
    """The border to the device's allocator."""

    def start(self) -> None: ...

    def peak(self) -> int:
        """The most bytes that were allocated at once since `start`, beyond those that were allocated then."""
        ...


class CudaMemoryMeter:
    def __init__(self) -> None:
        self._num_before = 0

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._num_before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._num_before


@torch.inference_mode()
def measure_workspace(
    model: Model,
    sampler: TokenSampler,
    make_attention: Callable[[KVCache], AttentionBackend],
    *,
    plan: MemoryPlan,
    meter: MemoryMeter,
) -> int:
    """Bytes that a step of max_num_batched_tokens and max_num_logits takes beside the weights and the cache."""
    layers = model.attention_layers
    codec = make_codec(plan.kv_codec)
    cache = KVCache(layers, num_blocks=1, block_size=plan.block_size, codec=codec, device=plan.device)
    executor = ModelExecutor(ModelRunner(model, cache, make_attention(cache)), sampler)
    builder = StepBuilder(
        plan.block_size,
        model.vocab_size,
        num_groups=len(plan.windows),
        counts_on_device=executor.keeps_token_counts,
    )
    inputs = builder.build(largest_step(plan))
    meter.start()
    executor.run(inputs)
    return meter.peak()


def largest_step(plan: MemoryPlan) -> list[Scheduled]:
    """The token budget, dealt out evenly; each sequence verifies as many drafts as it may have. The rows of logits that
    are left score tokens before those. The last sequence asks for no log-probabilities: those of others are copied.
    """
    num_each = min(plan.max_num_batched_tokens // plan.max_num_seqs, plan.max_model_len)
    num_left = plan.max_num_batched_tokens - num_each * plan.max_num_seqs
    first = min(num_each + num_left, plan.max_model_len)
    restricted = msgspec.structs.replace(PARAMS, allowed_token_ids=list(range(plan.facts.vocab_size)))
    plain = msgspec.structs.replace(restricted, logprobs=None)
    batch = [_scheduled(first if i == 0 else num_each, restricted, plan) for i in range(plan.max_num_seqs - 1)]
    batch.append(_scheduled(num_each if batch else first, plain, plan))
    num_rows = plan.max_num_logits - sum(item.num_logits for item in batch)
    for item in batch:
        item.num_scored = min(item.num_new_tokens - item.num_logits, num_rows)
        num_rows -= item.num_scored
    return batch


def _scheduled(num_tokens: int, params: SamplingParams, plan: MemoryPlan) -> Scheduled:
    num_drafts = min(plan.num_drafts, num_tokens - 1)
    token_ids = [0] * (num_tokens - num_drafts)
    seq = Sequence(Request(request_id="", prompt_token_ids=token_ids, params=params), token_ids)
    seq.draft_token_ids, seq.draft_parents = [0] * num_drafts, list(range(-1, num_drafts - 1))
    num_groups, num_blocks = len(plan.windows), -(-num_tokens // plan.block_size)
    seq.block_tables, seq.num_released_blocks = [[NULL_BLOCK] * num_blocks] * num_groups, [0] * num_groups
    return Scheduled(seq, num_tokens, num_drafts, samples=True)


def plan_with_workspace(plan: MemoryPlan, config: EngineConfig, machine: Machine, num_bytes: int) -> MemoryPlan:
    """The plan again, with what a step was seen to take. No longer sequences than before: the model is built for those.

    machine: as it was before the model was loaded. PlanError where the cache does not fit any more.
    """
    measured = plan_memory(plan.facts, config, machine, measured_workspace=num_bytes)
    if measured.max_model_len <= plan.max_model_len:
        return replace(measured, model_config=plan.model_config)
    length = {"model.max_model_len": plan.settings["model.max_model_len"]}
    return replace(
        measured,
        model_config=plan.model_config,
        max_model_len=plan.max_model_len,
        blocks_per_sequence=plan.blocks_per_sequence,
        settings=measured.settings | length,
    )
