"""Drafts of a smaller model, which decodes ahead in the target's blocks; whole engines are in `tests.engine`."""

from __future__ import annotations

from collections.abc import Sequence as Listing

from engine.speculation.draft_model import DraftModelProposer
from engine.types import Sequence
from tests.support.conformance.proposer import ProposerConformance, make_sequence, propose
from tests.support.speculating import BLOCK_SIZE, MAX_MODEL_LEN, make_draft_model

BLOCKS_OF_ONE = 30


class TestDraftModelProposer(ProposerConformance):
    num_blocks = 1  # that were given away, the null block first

    def make(self, num_drafts: int) -> DraftModelProposer:
        return DraftModelProposer(make_draft_model(600), num_drafts=num_drafts)

    def sequence(self, tokens: Listing[int], *, num_output: int = 0, **fields: object) -> Sequence:
        seq = make_sequence(tokens, num_output=num_output, **fields)
        self.num_blocks += BLOCKS_OF_ONE
        seq.block_tables = [list(range(self.num_blocks - BLOCKS_OF_ONE, self.num_blocks))]
        return seq

    def test_a_text_is_drafted_to_the_longest_that_the_model_takes_and_no_further(self) -> None:
        proposer = self.make(4)
        seq = self.sequence([1, 2] * (MAX_MODEL_LEN // 2 - 6))
        lengths = []
        while seq.num_tokens <= MAX_MODEL_LEN:
            lengths.append(len(propose(proposer, seq)[0]))
            seq.token_ids.append(1)
        assert len(seq.block_tables[0]) * BLOCK_SIZE > MAX_MODEL_LEN
        assert lengths[-8:] == [0, 0, 0, 0, 0, 0, 0, 0] or lengths[-1] == 0
        assert 4 in lengths
