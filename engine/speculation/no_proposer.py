"""Decoding without speculation."""

from __future__ import annotations

from engine.config import SpeculationConfig
from engine.speculation.proposer import ProposerContext, ProposerNeeds, TargetShape
from engine.speculation.verified_step import VerifiedStep


class NoProposer:
    """Proposes nothing: the null object, so that the engine need not ask whether it speculates."""

    needs = ProposerNeeds()

    @classmethod
    def from_config(cls, config: SpeculationConfig, context: ProposerContext) -> NoProposer:
        return cls()

    @classmethod
    def needs_of(cls, config: SpeculationConfig, target: TargetShape) -> ProposerNeeds:
        return cls.needs

    def propose(self, step: VerifiedStep) -> None:
        pass
