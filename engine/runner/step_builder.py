"""Makes the inputs of a step from the scheduler's plan: the only place that reads sequences for those who compute."""

from __future__ import annotations

import numpy as np

from engine.batch.block_tables import BlockTables
from engine.batch.gather import gather_step
from engine.batch.pooling import pooling_inputs
from engine.batch.step_inputs import StepInputs
from engine.sampling.metadata import SamplingBuilder
from engine.sampling.token_counts import CountKeeper
from engine.sampling.typical import TypicalRule
from engine.structured.grammar_states import GrammarStates
from engine.types import Scheduled


class StepBuilder:
    """Gathers each step's `StepInputs`. Runs on the host, in the engine's thread.

    What executors keep between steps (block tables, token counts) they are told as changes. Changes of tables are told
    again until `launched` says that a step which had them was launched; `failed` says that it was not.

    num_groups: groups of layers, each with a block table (`AttentionLayer.group`)
    counts_on_device: whether the executor's sampler keeps the token counts of penalised sequences itself
    shows_all_rows: whether somebody wants the hidden states of all rows, not of those with logits alone
    typical, grammars: as of `SamplingBuilder`
    """

    def __init__(
        self,
        block_size: int,
        vocab_size: int,
        *,
        num_groups: int = 1,
        counts_on_device: bool = False,
        shows_all_rows: bool = False,
        typical: TypicalRule | None = None,
        grammars: GrammarStates | None = None,
    ) -> None:
        self._shows_all_rows = shows_all_rows
        self._counts_on_device = counts_on_device
        self.block_size, self.vocab_size = block_size, vocab_size
        self.tables = BlockTables(num_groups)
        self.sampling = SamplingBuilder(
            vocab_size, CountKeeper() if counts_on_device else None, typical=typical, grammars=grammars
        )

    def fresh(self) -> StepBuilder:
        """One for an executor of the same kind that was told nothing yet."""
        return StepBuilder(
            self.block_size,
            self.vocab_size,
            num_groups=self.tables.num_groups,
            counts_on_device=self._counts_on_device,
            shows_all_rows=self._shows_all_rows,
            typical=self.sampling.typical,
            grammars=self.sampling.grammars,
        )

    def build(self, batch: list[Scheduled]) -> StepInputs:
        """The inputs of a plan, which must not be empty."""
        step = gather_step(batch, self.block_size)
        table_rows, width = self.tables.read(batch)
        pooled = pooling_inputs(batch, step, shows_all_rows=self._shows_all_rows)
        has_all_rows = self._shows_all_rows or pooled is not None
        return StepInputs(
            *step[:5],
            table_rows=table_rows,
            table_width=width,
            table_changes=self.tables.changes(),
            logits_rows=step.logits_rows,
            tree_mask=step.tree_mask,
            seqs=step.seqs,
            sampling=self.sampling.build(batch, step),
            sources=step.sources,
            hidden_rows=np.arange(len(step.input_ids)) if has_all_rows else None,
            pooled=pooled,
        )

    def launched(self) -> None:
        """The step of the last inputs was launched."""
        self.tables.acknowledge()

    def failed(self, batch: list[Scheduled]) -> None:
        """A step of these raised an error: how much of it was done is not known."""
        self.sampling.forget(batch)
