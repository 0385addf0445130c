"""Decoding without speculation."""

from engine.speculation.no_proposer import NoProposer
from tests.support.conformance.proposer import ProposerConformance


class TestNoProposer(ProposerConformance):
    guesses = False

    def make(self, num_drafts: int) -> NoProposer:
        return NoProposer()
