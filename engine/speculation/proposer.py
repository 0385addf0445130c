"""Proposers: who guesses the next tokens of a sequence (speculative decoding)."""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from engine.config import SpeculationConfig
from engine.lazy_import import load_object
from engine.types import Scheduled, Sequence


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


def draft_budget(seq: Sequence, configured: int) -> int:
    """The longest run of drafts for a sequence: what is configured, or fewer where its request asks for fewer.

    Never more than configured, which memory and kernels were planned for. Never more than max_tokens leaves room for,
    given that the step that verifies adds a token of its own.
    """
    asked = configured if seq.params.num_drafts is None else min(seq.params.num_drafts, configured)
    return max(0, min(asked, seq.params.max_tokens - seq.num_output_tokens - 1))


PROPOSERS = {  # speculation.method -> "module:Class"
    "none": "engine.speculation.no_proposer:NoProposer",
    "ngram": "engine.speculation.ngram:NgramProposer",
}


class _ProposerClass(Protocol):
    def from_config(self, config: SpeculationConfig) -> Proposer: ...


def build_proposer(config: SpeculationConfig) -> Proposer:
    """The configured proposer. Raises ValueError for a method that is not there or settings that contradict."""
    if config.method not in PROPOSERS:
        raise ValueError(f"speculation.method is {config.method!r}, but must be one of {', '.join(PROPOSERS)}")
    return cast(_ProposerClass, load_object(PROPOSERS[config.method])).from_config(config)
