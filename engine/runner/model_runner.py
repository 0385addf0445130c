"""Runs the model on one step's batch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engine.attention.backend import AttentionBackend
from engine.batch.block_tables import BlockTables
from engine.batch.forward_batch import Ahead, BatchBuilder, ForwardBatch
from engine.circuit_breaker import CircuitBreaker
from engine.kv_cache.storage import KVCache
from engine.models.model import Decoder
from engine.types import Sampled, Scheduled


class DecodeGraphs(Protocol):
    """Steps that were recorded once and are replayed since: `engine.runner.cuda_graphs` has them."""

    breaker: CircuitBreaker  # open while no graphs are made, because that has failed

    def forward(self, batch: list[Scheduled], ahead: Ahead | None) -> Tensor | None:
        """The hidden states of all rows of the batch, valid until the next call; None where it must run eagerly."""
        ...

    def clear(self) -> None:
        """Forgets all graphs and gives back their memory."""
        ...


class NoGraphs:
    """Every step runs eagerly."""

    def __init__(self) -> None:
        self.breaker = CircuitBreaker()

    def forward(self, batch: list[Scheduled], ahead: Ahead | None) -> Tensor | None:
        return None

    def clear(self) -> None:
        pass


class ModelRunner:
    """The model, its KV cache and the attention back end that reads it. `tables` are shared with the graphs."""

    def __init__(
        self,
        model: Decoder,
        kv_cache: KVCache,
        attention: AttentionBackend,
        *,
        block_size: int,
        tables: BlockTables | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.attention = attention
        self.block_size = block_size
        self.device = kv_cache.device
        self.graphs = graphs or NoGraphs()
        self.tables = tables or BlockTables()
        self._builder = BatchBuilder(block_size, self.device, self.tables)

    def forward(self, batch: list[Scheduled], ahead: Ahead | None = None) -> tuple[Tensor, Tensor]:
        """Runs the step. Returns (hidden states, logits), `num_logits` rows per item.

        ahead: where the host does not know the input tokens yet
        hidden states: [sum of num_logits, hidden_size], valid until the next call
        logits: [sum of num_logits, vocab_size], float32
        """
        hidden = self.graphs.forward(batch, ahead)
        if hidden is None:
            tensors = self._builder.build(batch, ahead)
            self.attention.plan(tensors)
            hidden = self._wanted_rows(self.model.forward(tensors, self.attention), tensors)
        return hidden, self.model.compute_logits(hidden)

    def release_memory(self) -> None:
        """Gives back what is only kept for speed. Call it when a step ran out of memory, outside of the handler: the
        error holds what the step had allocated."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a graph may be running: the step before this one, or one ahead of it
        self.graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def keep_accepted(self, batch: list[Scheduled], sampled: list[Sampled]) -> None:
        """Moves the KV of accepted tree drafts to where a chain of them would lie. A chain is there already.

        Call it before the scheduler updates the sequences.
        """
        sources: list[int] = []
        targets: list[int] = []
        for item, result in zip(batch, sampled, strict=True):
            base = item.seq.num_computed_tokens + item.num_new_tokens - item.num_drafts
            for depth, index in enumerate(result.accepted):
                if index != depth:
                    sources.append(self._slot(item, base + index))
                    targets.append(self._slot(item, base + depth))
        if sources:
            self.kv_cache.move(torch.tensor(sources, device=self.device), torch.tensor(targets, device=self.device))

    def _slot(self, item: Scheduled, position: int) -> int:
        return item.seq.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def _wanted_rows(self, hidden: Tensor, tensors: ForwardBatch) -> Tensor:
        if tensors.logits_rows.shape[0] == hidden.shape[0]:
            return hidden
        return hidden.index_select(0, tensors.logits_rows)
