"""Trees of drafts grown from Medusa heads."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch.step_inputs import RowFacts, SamplingInputs
from engine.config import SpeculationConfig
from engine.sampling.host_sampler import HostSampler
from engine.speculation.medusa import MedusaProposer, heads_of
from engine.speculation.verified_step import VerifiedStep
from engine.types import Sampled, Scheduled, Sequence
from tests.support.conformance.proposer import HIDDEN_SIZE, ProposerConformance, make_sequence, propose
from tests.support.faulty_device import VOCAB_SIZE
from tests.support.speculating import make_heads


class TestMedusaProposer(ProposerConformance):
    def make(self, num_drafts: int) -> MedusaProposer:
        heads = make_heads(None, num_heads=num_drafts, hidden_size=HIDDEN_SIZE)
        return MedusaProposer(heads, num_drafts=3 * num_drafts, vocab_size=VOCAB_SIZE)


class KnownHeads:
    """Heads whose scores are given: [num_heads, tokens], whatever the states."""

    def __init__(self, scores: Tensor) -> None:
        self.scores, self.num_heads = scores, len(scores)

    def logits(self, hidden: Tensor, newest: Tensor) -> Tensor:
        return self.scores.expand(len(hidden), -1, -1)

    def children(self, logits: Tensor, previous: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
        best = logits.log_softmax(-1).topk(min(num_candidates, logits.shape[-1]))
        return best.indices, best.values


def _drafts(proposer: MedusaProposer, seq: Sequence, max_depth: int = 64) -> list[tuple[int, int]]:
    step = VerifiedStep([Scheduled(seq, 1, 0, samples=True)], [Sampled(seq.token_ids[-1:])], torch.zeros(1, 4))
    step.max_depth = max_depth
    proposer.propose(step)
    return list(zip(seq.draft_token_ids, seq.draft_parents, strict=True))


def test_the_tree_has_the_paths_that_are_likeliest_by_the_heads() -> None:
    scores = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)) * 2
    chances = scores.softmax(-1)
    seq = make_sequence([1, 2], num_output=1, temperature=0.0)
    found = _drafts(MedusaProposer(KnownHeads(scores), num_drafts=6, vocab_size=20), seq)
    paths = []
    for index, (token_id, parent) in enumerate(found):
        paths.append((*(paths[parent] if parent >= 0 else ()), token_id))
        assert seq.draft_confidences[index] == pytest.approx(float(chances[len(paths[-1]) - 1, token_id]), abs=1e-6)
    every = [path for depth in (1, 2, 3) for path in product(range(20), repeat=depth)]
    every.sort(key=lambda path: -float(np.prod([chances[depth, token] for depth, token in enumerate(path)])))
    assert set(paths) == set(every[:6])


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_where_a_head_knows_the_distribution_its_first_draft_is_the_sample(temperature: float) -> None:
    """Candidates compete with the noise that the target's sample will have."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 1.5
    proposer = MedusaProposer(KnownHeads(logits), num_drafts=1, vocab_size=50)
    sampled = set()
    for seed in range(100):
        seq = make_sequence([1, 2, 3], num_output=1, temperature=temperature, seed=seed)
        ((draft, _),) = _drafts(proposer, seq)
        facts = RowFacts(
            seeds=np.array([seed], dtype=np.uint64),
            temperatures=np.array([temperature], dtype=np.float32),
            max_gaps=np.array([np.inf], dtype=np.float32),
            top_ks=np.array([50]),
            top_ps=np.array([1.0]),
            edits_before=np.array([0.0]),
            seq_of_row=np.array([0]),
        )
        inputs = SamplingInputs(logits_rows=np.array([0]), positions=np.array([3]), facts=facts)
        token = int(HostSampler(50).launch(logits, inputs).tokens[0])
        assert draft == token
        sampled.add(token)
    assert len(sampled) > 5


def test_no_deeper_than_the_heads_and_no_deeper_than_is_worth_it() -> None:
    scores = torch.zeros(3, 20)
    scores[:, 4] = 9.0
    proposer = MedusaProposer(KnownHeads(scores), num_drafts=9, vocab_size=20)
    for max_depth, deepest in ((64, 3), (2, 2), (1, 1)):
        seq = make_sequence([1, 2], num_output=1, temperature=0.0)
        found = _drafts(proposer, seq, max_depth)
        depths: list[int] = []
        for _, parent in found:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        assert max(depths) == deepest
    assert _drafts(proposer, make_sequence([1, 2], num_output=1), 0) == []


def test_sequences_are_drafted_for_together_as_alone() -> None:
    heads = make_heads(None, num_heads=3, hidden_size=HIDDEN_SIZE)
    proposer = MedusaProposer(heads, num_drafts=8, vocab_size=VOCAB_SIZE)
    texts = [[1, 2], [3, 4, 5], [7]]
    alone = [propose(proposer, make_sequence(text, temperature=0.7, seed=9))[0] for text in texts]
    assert propose(proposer, *(make_sequence(text, temperature=0.7, seed=9) for text in texts)) == alone


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_states_that_are_no_numbers_cost_their_own_sequence_its_drafts(temperature: float) -> None:
    size = 32  # whose products are compiled
    proposer = MedusaProposer(make_heads(None, hidden_size=size), num_drafts=8, vocab_size=VOCAB_SIZE)
    drafts = []
    for value in (1.0, torch.nan, torch.inf):
        seqs = [make_sequence([i, 2], num_output=1, temperature=temperature, seed=3) for i in range(3)]
        states = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
        states[1] *= value
        items = [Scheduled(seq, 1, 0, samples=True) for seq in seqs]
        proposer.propose(VerifiedStep(items, [Sampled([2])] * 3, states))
        drafts.append([seq.draft_token_ids for seq in seqs])
    assert all(drafts[0])
    for found in drafts[1:]:
        assert found == [drafts[0][0], [], drafts[0][2]]


def test_heads_that_are_not_there_are_said_to_be_missing() -> None:
    with pytest.raises(ValueError, match=r"no heads come with /models/another-model .*train-heads"):
        heads_of(SpeculationConfig(method="medusa"), "/models/another-model")
    assert str(heads_of(SpeculationConfig(method="medusa", model="/heads"), "x")) == "/heads"
