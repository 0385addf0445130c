"""The proposers: what they draft, when they do not, and what they remember."""

import gc
import random

import pytest
import torch

from engine.config import SpeculationConfig
from engine.speculation.ngram import MAX_INDEXED_PER_STEP, NgramIndex, NgramProposer
from engine.speculation.proposer import PROPOSERS, build_proposer
from engine.types import Request, SamplingParams, Scheduled, Sequence

HIDDEN = torch.zeros(1, 4)


def _sequence(tokens: list[int], *, num_output: int = 0, **fields: object) -> Sequence:
    params = SamplingParams(**{"seed": 0, "max_tokens": 1000, **fields})
    prompt = tokens[: len(tokens) - num_output]
    return Sequence(Request(request_id="r", prompt_token_ids=prompt, params=params), list(tokens))


def _propose(proposer: NgramProposer, *sequences: Sequence) -> list[list[int]]:
    proposer.propose([Scheduled(seq, 1, 0, samples=True) for seq in sequences], HIDDEN.expand(len(sequences), 4))
    return [seq.draft_token_ids for seq in sequences]


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
        sequences = [_sequence([rng.randrange(num_symbols) for _ in range(rng.randint(1, 12))]) for _ in range(3)]
        for _ in range(15):
            for seq, drafts in zip(sequences, _propose(proposer, *sequences), strict=True):
                assert drafts == _brute_force(seq.token_ids, **sizes)
                assert seq.draft_parents == [i - 1 for i in range(len(drafts))]
                num_drafted += len(drafts)
                seq.token_ids += [rng.randrange(num_symbols) for _ in range(rng.randint(1, 4))]
    assert num_drafted > 1000


def test_the_longest_match_wins_and_then_the_most_recent() -> None:
    proposer = NgramProposer(num_drafts=1, ngram_min=1, ngram_max=2)
    assert _propose(proposer, _sequence([1, 2, 7, 5, 2, 8, 1, 2])) == [[7]]  # 1 2 before the nearer 2
    assert _propose(proposer, _sequence([1, 2, 7, 1, 2, 8, 1, 2])) == [[8]]


def test_text_with_a_short_period_is_drafted_in_full() -> None:
    proposer = NgramProposer(num_drafts=5, ngram_min=2, ngram_max=3)
    assert _propose(proposer, _sequence([4, 9, 9, 9, 9])) == [[9] * 5]
    assert _propose(proposer, _sequence([1, 2, 3, 1, 2, 3])) == [[1, 2, 3, 1, 2]]


@pytest.mark.parametrize(
    ("fields", "num_output", "expected"),
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
def test_drafts_keep_to_the_budget(fields: dict[str, int | None], num_output: int, expected: int) -> None:
    seq = _sequence([6] * 20, num_output=num_output, **fields)
    assert _propose(NgramProposer(num_drafts=4, ngram_min=1, ngram_max=2), seq) == [[6] * expected]


def test_old_drafts_are_replaced_even_by_none() -> None:
    seq = _sequence([1, 2, 3])
    seq.draft_token_ids, seq.draft_parents = [5, 6], [-1, 0]
    assert _propose(NgramProposer(num_drafts=4, ngram_min=1, ngram_max=2), seq) == [[]]
    assert seq.draft_parents == []


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
    assert index.find_continuation(tokens) == 6
    assert tokens.num_slices <= 6  # three new n-grams, and at most three looked up


def test_a_long_prompt_is_indexed_over_several_steps_and_others_are_not_kept_from_it() -> None:
    proposer = NgramProposer(num_drafts=3, ngram_min=2, ngram_max=3)
    rng = random.Random(0)
    long = _sequence([rng.randrange(50, 10_000) for _ in range(5 * MAX_INDEXED_PER_STEP)] + [7, 8, 9, 7, 8])
    short = _sequence([1, 2, 3, 1, 2])
    num_steps = 0
    while _propose(proposer, short, long)[1] != [9, 7, 8]:
        num_steps += 1
        indices = proposer._indices
        assert sum(index.num_indexed_tokens for index in indices.values()) <= num_steps * MAX_INDEXED_PER_STEP
    assert num_steps == 5
    assert _propose(proposer, short)[0] == [3, 1, 2]


def test_a_short_text_is_drafted_from_at_once_whatever_is_indexed_before_it_in_the_batch() -> None:
    proposer = NgramProposer(num_drafts=3, ngram_min=2, ngram_max=3)
    long = _sequence(list(range(3 * MAX_INDEXED_PER_STEP)))
    assert _propose(proposer, long, _sequence([1, 2, 3, 1, 2]))[1] == [3, 1, 2]
    assert proposer._indices[long].num_indexed_tokens == MAX_INDEXED_PER_STEP - 5


def test_a_text_that_may_have_no_drafts_is_not_indexed() -> None:
    proposer = NgramProposer(num_drafts=3, ngram_min=2, ngram_max=3)
    seq = _sequence([1, 2, 3, 1, 2], num_drafts=0)
    assert _propose(proposer, seq) == [[]]
    assert not proposer._indices


def test_a_sequence_that_is_gone_is_forgotten() -> None:
    proposer = NgramProposer(num_drafts=4, ngram_min=1, ngram_max=2)
    seq = _sequence([1, 2, 1])
    _propose(proposer, seq)
    assert len(proposer._indices) == 1
    del seq
    gc.collect()
    assert len(proposer._indices) == 0


def test_a_text_that_became_shorter_is_indexed_anew() -> None:
    proposer = NgramProposer(num_drafts=1, ngram_min=1, ngram_max=1)
    seq = _sequence([1, 2, 3, 4, 1])
    assert _propose(proposer, seq) == [[2]]
    seq.token_ids = [1, 9, 1]
    assert _propose(proposer, seq) == [[9]]


@pytest.mark.parametrize("method", PROPOSERS)
def test_every_registered_proposer_is_built_from_the_config_and_proposes(method: str) -> None:
    proposer = build_proposer(SpeculationConfig(method=method))
    assert proposer.num_lookahead_tokens == 0
    seq = _sequence([1, 2, 3, 1, 2])
    proposer.propose([Scheduled(seq, 1, 0, samples=True)], HIDDEN)
    assert seq.draft_token_ids == {"none": [], "ngram": [3, 1, 2, 3]}[method]


def test_an_unknown_method_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'oracle', but must be one of none, ngram"):
        build_proposer(SpeculationConfig(method="oracle"))
