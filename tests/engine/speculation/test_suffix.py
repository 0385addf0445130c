"""Drafts copied from what a tenant's requests have said lately."""

import gc
import random

import msgspec
import pytest

from engine.speculation.suffix import MAX_IDLE_TENANTS, MAX_INDEXED_PER_STEP, SuffixIndex, SuffixProposer, Text
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
        assert index.num_tokens == sum(len(one.token_ids) - one.num_left for one in texts) <= 200
        assert all(not one.num_left or one.is_gone for one in texts)
        for anchor, listed in index._places.items():
            assert all(tuple(one.token_ids[end - 2 : end]) == anchor for one, end in listed)
            assert all(end >= one.num_left for one, end in listed)
    index.forget(texts[-1])
    assert texts[-1].is_gone
    index.let_leave(1000)
    assert (index.num_tokens, index._places) == (0, {})


def test_a_long_text_leaves_a_token_for_each_that_comes() -> None:
    """Its own length is nobody's pause."""
    rng = random.Random(0)
    index, old, new = SuffixIndex(max_tokens=5000), Text(), Text()
    index.extend(old, [rng.randrange(4) for _ in range(5000)], 5000)
    token_ids = [rng.randrange(4) for _ in range(4000)]
    for end in range(100, 4001, 100):
        index.extend(new, token_ids[:end], 100)
        assert old.is_gone
        assert old.num_left == end
        assert index.num_tokens == 5000
    assert not index.has(old)


def test_a_text_that_made_room_is_not_drafted_from() -> None:
    index, (text, _) = _index([1, 2, 3], [7, 8, 9])
    index.forget(text)
    assert index.continuation(Text(), [0, 1, 2], 1)[0] == []
    assert index.continuation(Text(), [0, 7, 8], 1)[0] == [9]


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


def test_tenants_whose_requests_run_never_make_room_for_others() -> None:
    """However many they are; of the others, those stay that were asked last."""
    proposer = SuffixProposer(num_drafts=3)
    running = [_of_tenant(f"running {i}", [1, 2, 3, 1, 2]) for i in range(MAX_IDLE_TENANTS + 40)]
    for seq in running:
        propose(proposer, seq)
    for i in range(MAX_IDLE_TENANTS + 9):
        propose(proposer, _of_tenant(f"gone {i}", [4, 5, 6]))
    gc.collect()
    assert propose(proposer, *running) == [[3, 1, 2]] * len(running)
    assert [salt for salt in proposer._tenants if salt.startswith("gone")] == [
        f"gone {i}" for i in range(9, MAX_IDLE_TENANTS + 9)
    ]
    assert propose(proposer, _of_tenant("gone 20", [0, 4, 5])) == [[6]]
    assert propose(proposer, _of_tenant("gone 3", [0, 4, 5])) == [[]]


def _num_tokens(proposer: SuffixProposer) -> int:
    return sum(index.num_tokens for index in (*proposer._leaving, *proposer._tenants.values()))


def test_many_tenants_together_are_bounded() -> None:
    """Those that come first are indexed, the others as soon as there is room: none in turns with another."""
    proposer = SuffixProposer(num_drafts=3, max_tokens=300, max_tokens_of_all=1000)
    rng = random.Random(2)
    running = [_of_tenant(str(i), [rng.randrange(9) for _ in range(200)]) for i in range(20)]
    for _ in range(3):
        for seq in running:
            propose(proposer, seq)
            assert _num_tokens(proposer) <= 1000
    assert [index.num_tokens for index in proposer._tenants.values()] == [200] * 5 + [0] * 15
    del running[:3], seq
    gc.collect()
    for one in running:
        propose(proposer, one)
        assert _num_tokens(proposer) <= 1000
    assert [index.num_tokens for index in proposer._tenants.values()] == [200] * 5 + [0] * 12


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_and_goes_all_texts_together_are_bounded(seed: int) -> None:
    proposer = SuffixProposer(num_drafts=3, max_tokens=300, max_tokens_of_all=1000)
    rng = random.Random(seed)
    running: list[Sequence] = []
    for _ in range(300):
        if rng.random() < 0.4:
            length = rng.randrange(2, 400)
            running.append(_of_tenant(str(rng.randrange(6)), [rng.randrange(9) for _ in range(length)]))
        if running and rng.random() < 0.4:
            del running[rng.randrange(len(running))]
        for one in running:
            one.token_ids += [rng.randrange(9) for _ in range(rng.randrange(1, 4))]
        propose(proposer, *running)
        assert _num_tokens(proposer) <= 1000
        for index in proposer._tenants.values():
            texts = {id(text): text for listed in index._places.values() for text, _ in listed}
            assert index.num_tokens >= sum(len(one.token_ids) for one in index._texts.values())
            assert all(one.is_gone or index.has(one) for one in texts.values())


def test_the_end_of_an_answer_is_known_to_the_next_request() -> None:
    """Of the step that ends a request too, which drafts nothing more for it."""
    proposer = SuffixProposer(num_drafts=4)
    seq = make_sequence([1, 2, 3])
    propose(proposer, seq)
    seq.token_ids += [4, 5]
    seq.finish_reason = "stop"
    assert propose(proposer, seq) == [[]]
    assert propose(proposer, make_sequence([9, 2, 3])) == [[4, 5]]
