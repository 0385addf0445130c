"""Runs the model on one step's inputs."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Ints
from engine.attention.backend import AttentionBackend
from engine.batch.device_inputs import BatchBuilder, to_device
from engine.batch.step_inputs import StepInputs
from engine.circuit_breaker import CircuitBreaker
from engine.kv_cache.storage import KVCache
from engine.models.model import Decoder
from engine.types import Sampled


class DecodeGraphs(Protocol):
    """Steps that were recorded once and are replayed since: `engine.runner.cuda_graphs` has them."""

    breaker: CircuitBreaker  # open while no graphs are made, because that has failed

    def forward(self, inputs: StepInputs, tokens: Tensor | None) -> Tensor | None:
        """The hidden states of all rows of the step, valid until the next call; None where it must run eagerly.

        tokens: as in `ModelRunner.forward`
        """
        ...

    def clear(self) -> None:
        """Forgets all graphs and gives back their memory."""
        ...


class NoGraphs:
    """Every step runs eagerly."""

    def __init__(self) -> None:
        self.breaker = CircuitBreaker()

    def forward(self, inputs: StepInputs, tokens: Tensor | None) -> Tensor | None:
        return None

    def clear(self) -> None:
        pass


class ModelRunner:
    """The model, its KV cache and the attention back end that reads it.

    builder: makes the tensors of a step and keeps the block tables; the graphs share it
    verifies_trees: whether a step may have trees of drafts
    """

    verifies_trees = True

    def __init__(
        self,
        model: Decoder,
        kv_cache: KVCache,
        attention: AttentionBackend,
        *,
        builder: BatchBuilder | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.attention = attention
        self.device = kv_cache.device
        self.graphs = graphs or NoGraphs()
        self.builder = builder or BatchBuilder(self.device)

    def forward(self, inputs: StepInputs, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the step. Returns the hidden states of `hidden_rows`, and the logits of those that are wanted.

        tokens: [num_tokens] the input ids, on the device, where the host does not know all of them
        hidden states: as of `Model.forward`, valid until the next call; logits: [num_logits, vocab_size], float32
        """
        hidden = self.graphs.forward(inputs, tokens)  # whose rows all have logits
        if hidden is None:
            tensors = self.builder.build(inputs, tokens)
            self.attention.plan(tensors)
            hidden, wanted, logits = self.model.compute_step(tensors, self.attention)
            return self._rows(hidden, inputs.hidden_rows, wanted), logits
        return self._rows(hidden, inputs.hidden_rows, hidden), self.model.logits_of(hidden)

    def _rows(self, hidden: Tensor, rows: Ints | None, wanted: Tensor) -> Tensor:
        if rows is None:
            return wanted
        return hidden if len(rows) == len(hidden) else hidden.index_select(0, to_device(rows, hidden.device))

    def release_memory(self) -> None:
        """Gives back what is only kept for speed. Call it when a step ran out of memory, outside of the handler: the
        error holds what the step had allocated."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a graph may be running: the step before this one, or one ahead of it
        self.graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def keep_accepted(self, inputs: StepInputs, sampled: list[Sampled]) -> None:
        """Moves the KV of accepted tree drafts to where a chain of them would lie. A chain is there already."""
        sources: list[int] = []
        targets: list[int] = []
        first_drafts = (inputs.query_starts[1:] - inputs.seqs.num_drafts).tolist()
        for first, result in zip(first_drafts, sampled, strict=True):
            for depth, index in enumerate(result.accepted):
                if index != depth:
                    sources.append(first + index)
                    targets.append(first + depth)
        if sources:
            slots = to_device(inputs.slots[:, np.array([sources, targets])], self.device)
            self.kv_cache.move(*slots.unbind(1))
