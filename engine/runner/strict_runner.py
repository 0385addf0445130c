"""`device.determinism: strict`, by construction: every token of a step goes through the model alone.

Libraries choose how to sum a product by its number of rows, so the last bits of a result depend on what else is in the
batch. Here the number is always one. A token's result then depends on nothing but the tokens before it: not on its
batch, on where its prompt was cut into chunks, on whether it was a draft. It costs as many passes over the weights as
a step has tokens; how many milliseconds that is, is not measured yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batch.forward_batch import Ahead, ForwardBatch
from engine.runner.model_runner import ModelRunner
from engine.types import Scheduled, Sequence


class OneTokenRunner(ModelRunner):
    """The model runner, but for the shape in which tokens meet the model."""

    def forward(self, batch: list[Scheduled], ahead: Ahead | None = None) -> tuple[Tensor, Tensor]:
        """As `ModelRunner` has it."""
        hidden: list[Tensor] = []
        logits: list[Tensor] = []
        for row, item in enumerate(batch):
            first_wanted = item.num_new_tokens - item.num_logits
            for i, token in enumerate([item] if ahead is not None else _one_by_one(item)):
                one = self._forward_one(self._builder.build([token], None if ahead is None else ahead.row(row)))
                if i >= first_wanted:
                    hidden.append(one)
                    logits.append(self.model.compute_logits(one))
        if not hidden:
            return self._nothing()
        return torch.cat(hidden), torch.cat(logits)

    def _forward_one(self, tensors: ForwardBatch) -> Tensor:
        self.attention.plan(tensors)
        return self.model.forward(tensors, self.attention)

    def _nothing(self) -> tuple[Tensor, Tensor]:
        hidden = torch.empty(0, self.model.hidden_size, device=self.device)
        return hidden, torch.empty(0, self.model.vocab_size, device=self.device)


def _one_by_one(item: Scheduled) -> list[Scheduled]:
    """The item's tokens as steps of their own, each of a sequence that ends with it."""
    seq, drafts = item.seq, item.seq.draft_token_ids[: item.num_drafts]
    is_chain = seq.draft_parents[: item.num_drafts] == list(range(-1, item.num_drafts - 1))
    assert is_chain, "strict determinism verifies chains of drafts: a token of a tree cannot see its path alone"
    token_ids = seq.token_ids[: seq.num_computed_tokens + item.num_new_tokens - item.num_drafts] + drafts
    positions = range(seq.num_computed_tokens, seq.num_computed_tokens + item.num_new_tokens)
    return [Scheduled(_ending_with(seq, token_ids, position), 1, 0, samples=True) for position in positions]


def _ending_with(seq: Sequence, token_ids: list[int], position: int) -> Sequence:
    return Sequence(
        seq.request,
        token_ids,
        num_computed_tokens=position,
        block_tables=seq.block_tables,
        num_released_blocks=seq.num_released_blocks,
    )
