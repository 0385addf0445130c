"""Proposers: who guesses the next tokens of a sequence (speculative decoding)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, cast

from engine.config import SpeculationConfig
from engine.lazy_import import load_object
from engine.speculation.verified_step import VerifiedStep
from engine.types import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposerNeeds:
    """What a proposer asks of the engine, the same for all steps and known before anything is built.

    num_drafts: of one sequence that a step verifies, at most: rows of a step, for which memory is planned.
    num_lookahead_tokens: KV slots past a sequence's newest token that proposing itself writes to.
    hidden: the target's hidden states that are shown: those that newest tokens were sampled from, or of all rows.
    hidden_layers: layers whose inputs are shown beside the last hidden states.
    """

    num_drafts: int = 0
    num_lookahead_tokens: int = 0
    hidden: Literal["none", "newest", "all"] = "none"
    hidden_layers: tuple[int, ...] = ()


class Proposer(Protocol):
    """Guesses the tokens that may follow. A wrong guess costs time, never correctness."""

    needs: ProposerNeeds

    def propose(self, step: VerifiedStep) -> None:
        """Sets the drafts (token ids and parents) of every sequence of `step.drafting`, to empty lists where it has no
        guess, and of no other.

        Called after the step's tokens were appended, also where none was: prompt chunks are shown as they are computed.
        Proposes no more than `draft_budget` tokens in a row, and no more than `needs.num_drafts` in all.
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

    def needs_of(self, config: SpeculationConfig) -> ProposerNeeds: ...


def build_proposer(config: SpeculationConfig) -> Proposer:
    """The configured proposer. Raises ValueError for a method that is not there or settings that contradict."""
    return _class_of(config).from_config(config)


def needs_of(config: SpeculationConfig) -> ProposerNeeds:
    """What the configured proposer will ask for. ValueError as `build_proposer`."""
    return _class_of(config).needs_of(config)


def _class_of(config: SpeculationConfig) -> _ProposerClass:
    if config.method not in PROPOSERS:
        raise ValueError(f"speculation.method is {config.method!r}, but must be one of {', '.join(PROPOSERS)}")
    return cast(_ProposerClass, load_object(PROPOSERS[config.method]))
