"""Runs steps: inputs in, tokens out. Knows arrays and tensors, and no sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.batch.device_inputs import to_device
from engine.batch.pooling import hand_out, sum_rows
from engine.batch.step_inputs import StepInputs
from engine.runner.model_runner import ModelRunner
from engine.sampling.output import SamplerOutput
from engine.sampling.sampler import TokenSampler
from engine.types import Sampled


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step.

    sampled: of each sequence, the tokens, the accepted drafts, log-probabilities, an error
    hidden: [rows that were asked for, features] as of `Model.forward`, valid until the next step; None: of a step that
    was computed in parts, or whose next one is running already
    """

    sampled: list[Sampled]
    hidden: Tensor | None = None


class InFlightStep:
    """A launched step, whose tokens the host does not know yet.

    tokens: [num_sampled] int64 on the device, negative where none could be chosen
    """

    def __init__(
        self,
        inputs: StepInputs,
        output: SamplerOutput,
        hidden: Tensor,
        keep_accepted: Callable[[StepInputs, list[Sampled]], None],
        *,
        pooled: Tensor | None = None,
    ) -> None:
        """pooled: the sums of `inputs.pooled`"""
        self.inputs = inputs
        self._output, self._hidden, self._keep_accepted, self._pooled = output, hidden, keep_accepted, pooled

    @property
    def tokens(self) -> Tensor:
        return self._output.tokens

    def finish(self) -> StepResult:
        """Waits for the tokens, and moves the KV of a tree's accepted drafts to where a chain would have it."""
        sampled = self._output.finish(self.inputs)
        if self.inputs.tree_mask is not None:
            self._keep_accepted(self.inputs, sampled)
        if self._pooled is not None and self.inputs.pooled is not None:
            hand_out(self._pooled, self.inputs.pooled, sampled)
        return StepResult(sampled, self._hidden)


class Executor(Protocol):
    """Runs the steps of one model: its weights, its KV cache and its block tables are the executor's own.

    keeps_token_counts: whether it counts the tokens of penalised sequences itself, as `CountChanges` tell it
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def keeps_token_counts(self) -> bool: ...

    @property
    def lacks_graphs(self) -> bool:
        """Whether no graphs are made for now, because that has failed."""
        ...

    def launch(self, inputs: StepInputs, newest: Tensor | None = None) -> InFlightStep:
        """Queues a step. newest: [num_sampled of the step before] its tokens, on the device, which `sources` name."""
        ...

    def run(self, inputs: StepInputs) -> StepResult:
        """Launches a step and waits for it."""
        ...

    def release_memory(self) -> None:
        """Gives back what is only kept for speed, after a step ran out of memory. Call it outside of the handler."""
        ...


class ModelExecutor:
    """An `Executor` in this process: the runner's forward pass, then the sampler."""

    def __init__(self, runner: ModelRunner, sampler: TokenSampler) -> None:
        self.runner, self.sampler = runner, sampler

    @property
    def vocab_size(self) -> int:
        return self.runner.model.vocab_size

    @property
    def keeps_token_counts(self) -> bool:
        return self.sampler.keeps_token_counts

    @property
    def lacks_graphs(self) -> bool:
        return self.runner.graphs.breaker.is_open

    @torch.inference_mode()
    def launch(self, inputs: StepInputs, newest: Tensor | None = None) -> InFlightStep:
        hidden, logits = self.runner.forward(inputs, None if newest is None else input_tokens(inputs, newest))
        pooled: Tensor | None = None
        if inputs.pooled is not None:
            pooled = sum_rows(hidden, inputs.pooled, self.runner.model.hidden_size)
            if inputs.pooled.shown is not None:
                hidden = hidden.index_select(0, to_device(inputs.pooled.shown, hidden.device))
        output = self.sampler.launch(logits, inputs.sampling, newest)
        return InFlightStep(inputs, output, hidden, self.runner.keep_accepted, pooled=pooled)

    def run(self, inputs: StepInputs) -> StepResult:
        return self.launch(inputs).finish()

    def release_memory(self) -> None:
        self.runner.release_memory()


def input_tokens(inputs: StepInputs, newest: Tensor) -> Tensor | None:
    """The input ids of a step, on the device, from what the step before sampled. None: the host knows all of them.

    A negative one, where no token could be chosen, counts as 0: its request ends before anybody looks.
    """
    sources = inputs.sources
    if sources is None:
        return None
    if len(sources) == len(newest) and np.array_equal(sources, np.arange(len(sources))):
        return newest.clamp_min(0)
    token_ids, rows = to_device(np.stack((inputs.input_ids, sources)), newest.device)
    return torch.where(rows < 0, token_ids, newest.index_select(0, rows.clamp_min(0)).clamp_min(0))
