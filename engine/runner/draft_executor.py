"""A second model beside the target: an executor and the inputs of its own steps (`speculation.proposer.DraftModel`)."""

from __future__ import annotations

import torch

from engine.runner.executor import Executor
from engine.runner.step_builder import StepBuilder
from engine.speculation.token_map import TokenMap
from engine.types import Sampled, Scheduled


class DraftExecutor:
    """Runs the draft model's steps, at once and on its own sequences."""

    def __init__(
        self,
        executor: Executor,
        builder: StepBuilder,
        tokens: TokenMap,
        *,
        max_model_len: int,
        max_num_tokens: int,
    ) -> None:
        self._executor, self._builder, self.tokens = executor, builder, tokens
        self.vocab_size, self.block_size = executor.vocab_size, builder.block_size
        self.num_groups = builder.tables.num_groups
        self.max_model_len, self.max_num_tokens = max_model_len, max_num_tokens

    @torch.inference_mode()
    def run(self, batch: list[Scheduled]) -> list[Sampled]:
        try:
            step = self._executor.launch(self._builder.build(batch))
            self._builder.launched()
            return step.finish().sampled
        except Exception:
            self._builder.failed(batch)
            raise
