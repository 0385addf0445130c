"""Speculative decoding: who guesses the next tokens."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.types import Scheduled


class Proposer(Protocol):
    """Guesses the tokens that may follow. A wrong guess costs time, never correctness."""

    num_lookahead_tokens: int  # KV slots past the newest token that proposing itself writes to

    def propose(self, batch: list[Scheduled], hidden_states: Tensor) -> None:
        """Sets the drafts (token ids and parents) of every sequence of the batch, to empty lists where it has no guess.

        Called after the step's tokens were appended, with the items that sampled and did not finish. Proposes no more
        than `draft_budget` tokens in a row. hidden_states: [len(batch), hidden_size], the target model's last hidden
        state at the row that each newest token was sampled from.
        """
        ...
