"""Decoding without speculation."""

from __future__ import annotations

from torch import Tensor

from engine.config import SpeculationConfig
from engine.types import Scheduled


class NoProposer:
    """Proposes nothing: the null object, so that the engine need not ask whether it speculates."""

    num_lookahead_tokens = 0

    @classmethod
    def from_config(cls, config: SpeculationConfig) -> NoProposer:
        return cls()

    def propose(self, batch: list[Scheduled], hidden_states: Tensor) -> None:
        pass
