"""Plans made by hand, taken through the inputs of a step: for tests of what computes, without an engine around it."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from engine.batch.device_inputs import BatchBuilder, ForwardBatch
from engine.batch.grammar_masks import GrammarMasks
from engine.batch.step_inputs import StepInputs
from engine.engine import Engine
from engine.kv_cache.layer_spec import windows_of
from engine.runner.executor import ModelExecutor, input_tokens
from engine.runner.model_runner import ModelRunner
from engine.runner.step_builder import StepBuilder
from engine.sampling.sampler import TokenSampler
from engine.sampling.typical import TypicalRule
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_stats import ModelCost
from engine.speculation.proposer import Proposer
from engine.speculation.speculator import Speculator
from engine.structured.grammar_states import GrammarStates
from engine.types import Sampled, Scheduled

VOCAB_SIZE = 1 << 20  # of inputs whose sampling nobody looks at
_OF_SAMPLERS: WeakKeyDictionary[TokenSampler, StepBuilder] = WeakKeyDictionary()
_OF_RUNNERS: WeakKeyDictionary[ModelRunner, StepBuilder] = WeakKeyDictionary()


def engine_of(
    runner: ModelRunner,
    scheduler: Scheduler,
    sampler: TokenSampler,
    proposer: Proposer,
    cost: ModelCost,
    *,
    overlap: bool = False,
    grammars: GrammarStates | None = None,
) -> Engine:
    executor = ModelExecutor(runner, sampler)
    speculator = Speculator(proposer, executor.vocab_size, grammars=grammars)
    return Engine(executor, scheduler, speculator, cost, overlap=overlap)


def step_inputs(batch: list[Scheduled], block_size: int, *, typical: TypicalRule | None = None) -> StepInputs:
    """Inputs for an executor that has seen no step before."""
    num_groups = len(batch[0].seq.block_tables)
    return StepBuilder(block_size, VOCAB_SIZE, num_groups=num_groups, typical=typical).build(batch)


def build_forward_batch(batch: list[Scheduled], block_size: int, device: torch.device) -> ForwardBatch:
    """One batch in memory of its own."""
    return BatchBuilder(device).build(step_inputs(batch, block_size))


def forward(runner: ModelRunner, batch: list[Scheduled], newest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of a plan, as one of the runner's steps. newest: what the step before sampled"""
    inputs = inputs_for(runner, batch)
    return runner.forward(inputs, None if newest is None else input_tokens(inputs, newest))


def inputs_for(runner: ModelRunner, batch: list[Scheduled]) -> StepInputs:
    """The inputs of a plan, as one of the runner's steps."""
    builder = _OF_RUNNERS.get(runner)
    if builder is None:
        num_groups = len(windows_of(runner.model.attention_layers))
        builder = StepBuilder(runner.kv_cache.block_size, runner.model.vocab_size, num_groups=num_groups)
        _OF_RUNNERS[runner] = builder
    inputs = builder.build(batch)
    builder.launched()
    return inputs


def sample(
    sampler: TokenSampler,
    logits: Tensor,
    batch: list[Scheduled],
    newest: Tensor | None = None,
    *,
    masks: GrammarMasks | None = None,
) -> list[Sampled]:
    """What a sampler decides for a plan. It remembers the plans that it was given before."""
    builder = _OF_SAMPLERS.get(sampler)
    if builder is None:
        builder = StepBuilder(16, sampler.vocab_size, counts_on_device=sampler.keeps_token_counts)
        _OF_SAMPLERS[sampler] = builder
    for item in batch:  # nobody looks at blocks here
        num_blocks = (item.num_computed_tokens + item.num_new_tokens) // 16 + 1
        item.seq.block_tables = item.seq.block_tables or [[]]
        item.seq.block_tables[0] += [0] * (num_blocks - len(item.seq.block_table))
    inputs = builder.build(batch)
    assert len(logits) == len(inputs.logits_rows), f"{len(logits)} rows of logits for {len(inputs.logits_rows)}"
    inputs = replace(inputs, sampling=replace(inputs.sampling, masks=masks))
    return sampler.launch(logits, inputs.sampling, newest).finish(inputs)
