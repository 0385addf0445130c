"""Drafts copied from the text: which, how soon, and at what cost."""

import random

import pytest

from engine.speculation.ngram import MAX_INDEXED_PER_STEP, NgramIndex, NgramProposer
from tests.support.conformance.proposer import ProposerConformance, make_sequence, propose


class TestNgramProposer(ProposerConformance):
    def make(self, num_drafts: int) -> NgramProposer:
        return NgramProposer(num_drafts=num_drafts, ngram_min=1, ngram_max=2)


def _brute_force(tokens: list[int], *, num_drafts: int, ngram_min: int, ngram_max: int) -> list[int]:
    for n in range(ngram_max, ngram_min - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) > n and tokens[end - n : end] == tokens[-n:]:
                text = list(tokens)
                for i in range(num_drafts):
                    text.append(text[end + i])
                return text[len(tokens) :]
    return []


@pytest.mark.parametrize(("ngram_min", "ngram_max"), [(1, 1), (1, 3), (2, 4), (3, 3)])
def test_drafts_equal_brute_force_while_texts_grow(ngram_min: int, ngram_max: int) -> None:
    rng = random.Random(ngram_max)
    sizes = {"num_drafts": 5, "ngram_min": ngram_min, "ngram_max": ngram_max}
    proposer = NgramProposer(**sizes)
    num_drafted = 0
    for _ in range(20):
        num_symbols = rng.choice([1, 2, 3, 10])
        sequences = [make_sequence([rng.randrange(num_symbols) for _ in range(rng.randint(1, 12))]) for _ in range(3)]
        for _ in range(15):
            for seq, drafts in zip(sequences, propose(proposer, *sequences), strict=True):
                assert drafts == _brute_force(seq.token_ids, **sizes)
                assert seq.draft_parents == [i - 1 for i in range(len(drafts))]
                num_drafted += len(drafts)
                seq.token_ids += [rng.randrange(num_symbols) for _ in range(rng.randint(1, 4))]
    assert num_drafted > 1000


def test_the_longest_match_wins_and_then_the_most_recent() -> None:
    proposer = NgramProposer(num_drafts=1, ngram_min=1, ngram_max=2)
    assert propose(proposer, make_sequence([1, 2, 7, 5, 2, 8, 1, 2])) == [[7]]  # 1 2 before the nearer 2
    assert propose(proposer, make_sequence([1, 2, 7, 1, 2, 8, 1, 2])) == [[8]]


def test_text_with_a_short_period_is_drafted_in_full() -> None:
    proposer = NgramProposer(num_drafts=5, ngram_min=2, ngram_max=3)
    assert propose(proposer, make_sequence([4, 9, 9, 9, 9])) == [[9] * 5]
    assert propose(proposer, make_sequence([1, 2, 3, 1, 2, 3])) == [[1, 2, 3, 1, 2]]


def test_each_token_is_indexed_once() -> None:
    class CountingList(list[int]):
        num_slices = 0

        def __getitem__(self, key):
            self.num_slices += isinstance(key, slice)
            return super().__getitem__(key)

    tokens = CountingList(range(2000))
    index = NgramIndex(range(3, 0, -1))
    assert index.extend(tokens, 10_000) == 2000
    assert tokens.num_slices >= 3 * 1990
    tokens.num_slices = 0
    tokens.append(5)
    assert index.extend(tokens, 10_000) == 1
    assert index.find_continuation(tokens) == (6, 1)
    assert tokens.num_slices <= 6  # three new n-grams, and at most three looked up


def test_a_long_prompt_is_indexed_over_several_steps_and_others_are_not_kept_from_it() -> None:
    proposer = NgramProposer(num_drafts=3, ngram_min=2, ngram_max=3)
    rng = random.Random(0)
    long = make_sequence([rng.randrange(50, 10_000) for _ in range(5 * MAX_INDEXED_PER_STEP)] + [7, 8, 9, 7, 8])
    short = make_sequence([1, 2, 3, 1, 2])
    num_steps = 0
    while propose(proposer, short, long)[1] != [9, 7, 8]:
        num_steps += 1
        indices = proposer._indices
        assert sum(index.num_indexed_tokens for index in indices.values()) <= num_steps * MAX_INDEXED_PER_STEP
    assert num_steps == 5
    assert propose(proposer, short)[0] == [3, 1, 2]


def test_a_short_text_is_drafted_from_at_once_whatever_is_indexed_before_it_in_the_batch() -> None:
    proposer = NgramProposer(num_drafts=3, ngram_min=2, ngram_max=3)
    long = make_sequence(list(range(3 * MAX_INDEXED_PER_STEP)))
    assert propose(proposer, long, make_sequence([1, 2, 3, 1, 2]))[1] == [3, 1, 2]
    assert proposer._indices[long].num_indexed_tokens == MAX_INDEXED_PER_STEP - 5


def test_a_text_that_may_have_no_drafts_is_not_indexed() -> None:
    proposer = NgramProposer(num_drafts=3, ngram_min=2, ngram_max=3)
    seq = make_sequence([1, 2, 3, 1, 2], num_drafts=0)
    assert propose(proposer, seq) == [[]]
    assert not proposer._indices
