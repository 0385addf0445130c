"""Ways to guess the next tokens."""

from __future__ import annotations

from typing import Protocol, cast

from engine.config import SpeculationConfig
from engine.places import load_object
from engine.proposers.proposer import Proposer

PROPOSERS = {  # speculation.method -> "module:Class"
    "none": "engine.proposers.none:NoProposer",
    "ngram": "engine.proposers.ngram:NgramProposer",
}


class _ProposerClass(Protocol):
    def from_config(self, config: SpeculationConfig) -> Proposer: ...


def build_proposer(config: SpeculationConfig) -> Proposer:
    """The configured proposer. Raises ValueError for a method that is not there or settings that contradict."""
    if config.method not in PROPOSERS:
        raise ValueError(f"speculation.method is {config.method!r}, but must be one of {', '.join(PROPOSERS)}")
    return cast(_ProposerClass, load_object(PROPOSERS[config.method])).from_config(config)
