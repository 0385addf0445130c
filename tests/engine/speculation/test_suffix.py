"""Drafts copied from what a tenant's requests have said lately."""

import random

import msgspec
import pytest

from engine.speculation.suffix import MAX_INDEXED_PER_STEP, MAX_TENANTS, SuffixIndex, SuffixProposer, Text
from engine.types import Sequence
from tests.support.conformance.proposer import ProposerConformance, make_sequence, propose


class TestSuffixProposer(ProposerConformance):
    def make(self, num_drafts: int) -> SuffixProposer:
        return SuffixProposer(num_drafts=num_drafts)


def _index(*texts: list[int]) -> tuple[SuffixIndex, list[Text]]:
    index, made = SuffixIndex(), []
    for token_ids in texts:
        made.append(Text())
        index.extend(made[-1], token_ids, 10_000)
    return index, made


def test_what_other_requests_have_said_is_drafted() -> None:
    proposer = SuffixProposer(num_drafts=4)
    propose(proposer, make_sequence([1, 2, 3, 4, 5, 6, 7]))
    assert propose(proposer, make_sequence([9, 9, 3, 4])) == [[5, 6, 7]]


def test_nothing_is_taken_from_another_tenant() -> None:
    proposer = SuffixProposer(num_drafts=4)
    seq = make_sequence([1, 2, 3, 4, 5, 6, 7])
    seq.request = type(seq.request)(
        request_id="r", prompt_token_ids=[1], params=seq.request.params, cache_salt="another"
    )
    propose(proposer, seq)
    assert propose(proposer, make_sequence([9, 9, 3, 4])) == [[]]


def test_the_longest_match_wins_and_then_what_came_most_often() -> None:
    index, _ = _index([1, 2, 3, 7, 0, 1, 2, 3, 7, 0], [1, 2, 3, 8], [5, 2, 3, 9], [6, 2, 3, 9], [4, 2, 3, 9])
    assert index.continuation(Text(), [1, 2, 3], 1)[0] == [7]  # two of three, and 2 3 9 is shorter
    assert index.continuation(Text(), [0, 2, 3], 1)[0] == [9]


def test_a_draft_is_surer_the_more_places_agree_and_the_longer_they_match() -> None:
    index, _ = _index([1, 2, 7], [0, 1, 2, 7], [4, 1, 2, 8])
    of_two = index.continuation(Text(), [1, 2], 1)[1][0]
    index, _ = _index([1, 2, 7], [0, 1, 2, 7], [4, 1, 2, 7])
    of_three = index.continuation(Text(), [1, 2], 1)[1][0]
    index, _ = _index([9, 9, 9, 9, 9, 1, 2, 7])
    of_long = index.continuation(Text(), [9, 9, 9, 9, 9, 1, 2], 1)[1][0]
    of_short = index.continuation(Text(), [0, 1, 2], 1)[1][0]
    assert 0 < of_two < of_three < 1
    assert of_short < of_long < 1


def test_no_more_is_drafted_than_the_match_is_worth() -> None:
    index, _ = _index(list(range(100)))
    assert len(index.continuation(Text(), [90, 5, 6], 50)[0]) == 4  # two tokens match
    assert len(index.continuation(Text(), list(range(1, 11)), 50)[0]) == 20


def test_a_text_with_a_period_is_drafted_on_and_another_text_ends_where_it_ends() -> None:
    index, (own, _) = _index([1, 2, 3, 1, 2, 3], [7, 8, 9])
    assert index.continuation(own, [1, 2, 3, 1, 2, 3], 6)[0] == [1, 2, 3, 1, 2, 3]
    assert index.continuation(Text(), [0, 7, 8], 6)[0] == [9]


@pytest.mark.parametrize("seed", range(5))
def test_the_index_is_bounded_and_the_oldest_texts_make_room(seed: int) -> None:
    rng = random.Random(seed)
    index, texts = SuffixIndex(max_tokens=200), []
    for _ in range(60):
        text = Text()
        index.extend(text, [rng.randrange(6) for _ in range(rng.randrange(1, 60))], 1000)
        texts.append(text)
        known = [one for one in texts if not one.is_gone]
        assert index.num_tokens == sum(len(one.token_ids) for one in known) <= 200
        places = [place for listed in index._places.values() for place in listed]
        assert all(not one.is_gone for one, _ in places)
        for anchor, listed in index._places.items():
            assert all(tuple(one.token_ids[end - 2 : end]) == anchor for one, end in listed)
    index.forget(texts[-1])
    assert texts[-1].is_gone


def test_a_long_prompt_takes_several_steps_and_keeps_nobody_waiting() -> None:
    proposer = SuffixProposer(num_drafts=3)
    rng = random.Random(0)
    long = make_sequence([rng.randrange(50, 10_000) for _ in range(3 * MAX_INDEXED_PER_STEP)] + [7, 8, 9, 7, 8])
    short = make_sequence([1, 2, 3, 1, 2])
    assert propose(proposer, long, short)[1] == [3, 1, 2]
    num_steps = 1
    while not propose(proposer, long)[0]:
        num_steps += 1
    assert num_steps == 3


def _of_tenant(salt: str, tokens: list[int]) -> Sequence:
    seq = make_sequence(tokens)
    seq.request = msgspec.structs.replace(seq.request, cache_salt=salt)
    return seq


def test_a_request_whose_tenant_had_to_make_room_is_indexed_anew_and_counted_right() -> None:
    proposer = SuffixProposer(num_drafts=3, max_tokens=300)
    rng = random.Random(1)
    seq = _of_tenant("first", [rng.randrange(9) for _ in range(250)])
    propose(proposer, seq)
    for i in range(MAX_TENANTS):
        propose(proposer, _of_tenant(str(i), [1, 2, 3]))
    assert "first" not in proposer._tenants
    seq.token_ids += [7, 7]
    propose(proposer, seq)
    others = [_of_tenant("first", [rng.randrange(9) for _ in range(90)]) for _ in range(9)]
    for one in (seq, *others):
        propose(proposer, one)
        index = proposer._tenants["first"]
        assert index.num_tokens == sum(len(text.token_ids) for text in index._texts.values()) <= 300


def test_many_tenants_together_are_bounded() -> None:
    proposer = SuffixProposer(num_drafts=3, max_tokens=300, max_tokens_of_all=1000)
    rng = random.Random(2)
    running = [_of_tenant(str(i), [rng.randrange(9) for _ in range(200)]) for i in range(20)]
    for _ in range(3):
        for seq in running:
            propose(proposer, seq)
            assert sum(index.num_tokens for index in proposer._tenants.values()) <= 1000
    assert len(proposer._tenants) == 5
    assert propose(proposer, running[-1])[0]
