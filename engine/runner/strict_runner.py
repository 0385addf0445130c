"""`device.determinism: strict`, by construction: every token of a step goes through the model alone.

Libraries choose how to sum a product by its number of rows, so the last bits of a result depend on what else is in the
batch. Here the number is always one. A token's result then depends on nothing but the tokens before it: not on its
batch, on where its prompt was cut into chunks, on whether it was a draft. It costs as many passes over the weights as
a step has tokens; how many milliseconds that is, is not measured yet.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.batch.step_inputs import StepInputs
from engine.runner.model_runner import ModelRunner


class OneTokenRunner(ModelRunner):
    """The model runner, but for the shape in which tokens meet the model."""

    verifies_trees = False

    def forward(self, inputs: StepInputs, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `ModelRunner` has it."""
        assert inputs.tree_mask is None, (
            "strict determinism verifies chains of drafts: none sees its path alone in a tree"
        )
        wanted = set(inputs.logits_rows.tolist())
        hidden_rows = (inputs.logits_rows if inputs.hidden_rows is None else inputs.hidden_rows).tolist()
        shown = set(hidden_rows)
        hidden: dict[int, Tensor] = {}
        logits: list[Tensor] = []
        for row in range(inputs.num_tokens):
            alone = None if tokens is None else tokens[row : row + 1]
            batch = self.builder.build(one_token(inputs, row), alone)
            self.attention.plan(batch)
            one = self.model.forward(batch, self.attention)
            if row in shown:
                hidden[row] = one
            if row in wanted:
                logits.append(self.model.logits_of(one))
        return (
            torch.cat([hidden[row] for row in hidden_rows])
            if hidden
            else torch.empty(0, one.shape[1], device=self.device),
            torch.cat(logits) if logits else torch.empty(0, self.model.vocab_size, device=self.device),
        )


def one_token(inputs: StepInputs, row: int) -> StepInputs:
    """A step of one of the rows alone: its sequence ends with it."""
    seq = int(np.searchsorted(inputs.query_starts, row, side="right")) - 1
    this, first = slice(row, row + 1), np.zeros(1, dtype=np.int64)
    return replace(
        inputs,
        input_ids=inputs.input_ids[this],
        positions=inputs.positions[this],
        slots=inputs.slots[:, this],
        query_starts=np.arange(2),
        seq_lens=inputs.positions[this] + 1,
        table_rows=inputs.table_rows[:, seq : seq + 1],
        logits_rows=first,
        sources=None,
    )
