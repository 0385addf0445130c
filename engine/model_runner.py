"""Runs the model on one step's batch."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.attention import AttentionBackend
from engine.forward_batch import ForwardBatch, build_forward_batch
from engine.kv_cache import KVCache
from engine.models.model import Model
from engine.types import Sampled, Scheduled


class ModelRunner:
    """The model, its KV cache and the attention back end that reads it."""

    def __init__(self, model: Model, kv_cache: KVCache, attention: AttentionBackend, *, block_size: int) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.attention = attention
        self.block_size = block_size
        self.device = kv_cache.kv[0].device

    def forward(self, batch: list[Scheduled]) -> tuple[Tensor, Tensor]:
        """Runs the step. Returns (hidden states, logits), `num_logits` rows per item.

        hidden states: [sum of num_logits, hidden_size]; logits: [sum of num_logits, vocab_size], float32
        """
        tensors = build_forward_batch(batch, self.block_size, self.device)
        self.attention.plan(tensors)
        hidden = self._wanted_rows(self.model.forward(tensors, self.attention), tensors)
        return hidden, self.model.compute_logits(hidden)

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
