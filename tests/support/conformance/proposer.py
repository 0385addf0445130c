"""The laws of a proposer (`engine.speculation.proposer.Proposer`)."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Sequence as Listing

import pytest
import torch

from engine.speculation.proposer import Proposer, draft_budget
from engine.speculation.verified_step import VerifiedStep
from engine.types import Request, Sampled, SamplingParams, Scheduled, Sequence
from tests.support.answers import answer_all
from tests.support.faulty_device import VOCAB_SIZE, make_engine

HIDDEN_SIZE = 4


def make_sequence(tokens: Listing[int], *, num_output: int = 0, **fields: object) -> Sequence:
    params = SamplingParams(**{"seed": 0, "max_tokens": 1000, **fields})
    prompt = list(tokens[: len(tokens) - num_output])
    return Sequence(Request(request_id="r", prompt_token_ids=prompt, params=params), list(tokens))


def propose(proposer: Proposer, *seqs: Sequence) -> list[list[int]]:
    """The drafts of sequences whose newest tokens were just appended, in a step that decoded one token of each."""
    items = [Scheduled(seq, 1, 0, samples=True) for seq in seqs]
    sampled = [Sampled([seq.token_ids[-1]]) for seq in seqs]
    proposer.propose(VerifiedStep(items, sampled, torch.zeros(len(seqs), HIDDEN_SIZE)))
    return [seq.draft_token_ids for seq in seqs]


def assert_well_formed(seq: Sequence, budget: int) -> None:
    """A forest whose parents come first, with no two siblings alike, and no deeper than the budget."""
    assert len(seq.draft_parents) == len(seq.draft_token_ids)
    depths: list[int] = []
    for index, parent in enumerate(seq.draft_parents):
        assert -1 <= parent < index
        depths.append(1 if parent < 0 else 1 + depths[parent])
    assert max(depths, default=0) <= budget
    siblings = list(zip(seq.draft_parents, seq.draft_token_ids, strict=True))
    assert len(set(siblings)) == len(siblings)


class RaisesHalfway:
    """A proposer that fails every other time, after it has proposed."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self.needs = proposer.needs
        self.num_calls = 0

    def propose(self, step: VerifiedStep) -> None:
        self._proposer.propose(step)
        self.num_calls += 1
        if self.num_calls % 2:
            raise RuntimeError("the guess failed on order")


class ProposerConformance:
    """Proposals are looked at where the engine takes them: in the sequences."""

    num_drafts = 4
    guesses = True  # of texts that repeat themselves there is a guess

    @pytest.fixture(autouse=True)
    def _reproducible(self, one_thread_and_seed: None) -> None:
        """Every test begins with the same seed."""

    def make(self, num_drafts: int) -> Proposer:
        """One that proposes runs of at most so many drafts."""
        raise NotImplementedError

    def sequence(self, tokens: Listing[int], *, num_output: int = 0, **fields: object) -> Sequence:
        """One with blocks, for a proposer that works in those of the target."""
        return make_sequence(tokens, num_output=num_output, **fields)

    def test_it_says_what_it_needs_before_it_is_asked(self) -> None:
        needs = self.make(self.num_drafts).needs
        assert needs.num_lookahead_tokens >= 0
        assert needs.num_drafts >= self.num_drafts * self.guesses  # a tree has more than its longest run

    def test_a_prompt_that_is_not_complete_is_seen_and_gets_no_drafts(self) -> None:
        """It comes in three chunks beside a text that goes on; then it is drafted as a new one is."""
        proposer, other = self.make(self.num_drafts), self.sequence([1, 2, 1, 2], num_output=1)
        prompt = self.sequence([6, 7] * 6)
        for end in (4, 8, 12):
            chunk = Scheduled(prompt, 4, 0, samples=end == 12)
            prompt.num_computed_tokens = end
            other.token_ids.append(1 + len(other.token_ids) % 2)
            if chunk.samples:
                prompt.token_ids.append(6)
            sampled = [Sampled([6] * chunk.samples), Sampled(other.token_ids[-1:])]
            hidden = torch.zeros(5 if proposer.needs.hidden == "all" else 1 + chunk.samples, HIDDEN_SIZE)
            proposer.propose(VerifiedStep([chunk, Scheduled(other, 1, 0, samples=True)], sampled, hidden))
            assert bool(other.draft_token_ids) == self.guesses
            assert bool(prompt.draft_token_ids) == (self.guesses and chunk.samples)
        assert_well_formed(prompt, self.num_drafts)

    @pytest.mark.parametrize(
        ("fields", "num_output", "budget"),
        [
            ({}, 1, 4),
            ({"num_drafts": None}, 1, 4),
            ({"num_drafts": 0}, 1, 0),
            ({"num_drafts": 2}, 1, 2),
            ({"num_drafts": 7}, 1, 4),  # memory and kernels were planned for 4
            ({"num_drafts": 64}, 1, 4),
            ({"max_tokens": 4}, 1, 2),  # 2 drafts and the token after them make 4
            ({"max_tokens": 4, "num_drafts": 3}, 1, 2),
            ({"max_tokens": 2}, 1, 0),
            ({"max_tokens": 10}, 9, 0),
        ],
    )
    def test_no_run_of_drafts_is_longer_than_the_budget(
        self, fields: dict[str, int | None], num_output: int, budget: int
    ) -> None:
        seq = self.sequence([6] * 20, num_output=num_output, **fields)
        assert draft_budget(seq, 4) == budget
        (drafts,) = propose(self.make(4), seq)
        assert_well_formed(seq, budget)
        assert bool(drafts) == (self.guesses and budget > 0)

    def test_drafts_are_forests_of_known_tokens_while_texts_grow_and_company_changes(self) -> None:
        rng = random.Random(3)
        proposer = self.make(self.num_drafts)
        seqs = [self.sequence([rng.randrange(1 + i % 5) for _ in range(rng.randint(1, 12))]) for i in range(8)]
        num_drafted = 0
        for _ in range(30):
            chosen = rng.sample(seqs, rng.randint(1, len(seqs)))
            for seq, drafts in zip(chosen, propose(proposer, *chosen), strict=True):
                assert_well_formed(seq, self.num_drafts)
                assert set(drafts) <= set(range(VOCAB_SIZE))
                num_drafted += len(drafts)
                seq.token_ids += rng.choice([drafts[:2], []]) + [rng.randrange(5) for _ in range(rng.randint(1, 3))]
        assert (num_drafted > 100) == self.guesses

    def test_a_guess_that_is_no_longer_allowed_is_taken_back(self) -> None:
        proposer = self.make(self.num_drafts)
        seq = self.sequence([6] * 20, num_output=1, max_tokens=4)
        propose(proposer, seq)
        seq.token_ids += [6, 6]  # one more may come, which needs no draft
        assert propose(proposer, seq) == [[]]
        assert seq.draft_parents == []

    def test_a_text_that_became_shorter_is_drafted_as_a_new_one_is(self) -> None:
        """A step that failed after its tokens were appended takes them back."""
        proposer = self.make(self.num_drafts)
        seq = self.sequence([1, 2, 3, 4, 1])
        propose(proposer, seq)
        seq.token_ids = [1, 9, 1]
        assert propose(proposer, seq) == propose(self.make(self.num_drafts), self.sequence([1, 9, 1]))

    def test_a_sequence_that_is_gone_is_forgotten(self) -> None:
        proposer = self.make(self.num_drafts)
        seq = self.sequence([1, 2, 1])
        propose(proposer, seq)
        gone = weakref.ref(seq)
        del seq
        gc.collect()
        assert gone() is None

    @pytest.mark.parametrize("fails", [False, True])
    def test_drafts_and_proposers_that_fail_never_change_the_output(self, fails: bool) -> None:
        rng = random.Random(2)
        requests = []
        for i, (length, temperature) in enumerate([(3, 0.0), (30, 0.0), (9, 0.8), (17, 0.8)]):
            prompt = [rng.randrange(4) for _ in range(length)]
            params = SamplingParams(seed=i, max_tokens=20, temperature=temperature)
            requests.append(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
        proposer = self.make(self.num_drafts)
        engine = make_engine(proposer=RaisesHalfway(proposer) if fails else proposer)
        answered = answer_all(engine, requests, at_once=2)
        assert answered.tokens == answer_all(make_engine(), requests, at_once=2).tokens
        assert engine.scheduler.kv.pool.num_owned == 0
