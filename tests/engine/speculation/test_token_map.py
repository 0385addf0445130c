"""A draft model's token ids and its target's."""

import pytest

from engine.speculation.token_map import map_tokens

TARGET = {f"t{i}": i for i in range(1000)}


def test_the_same_vocabulary_needs_no_map() -> None:
    tokens = map_tokens(TARGET, dict(TARGET), 1000, target_size=1000)
    assert not tokens.to_draft
    assert not tokens.to_target
    assert tokens.of_draft([1, 999]) == [1, 999]


def test_special_tokens_that_differ_are_mapped_and_those_that_one_lacks_have_no_counterpart() -> None:
    draft = dict(TARGET) | {"t5": 1000, "<think>": 5}
    tokens = map_tokens(TARGET | {"<pad>": 1001}, draft, 1001, target_size=1002)
    assert tokens.of_draft([5, 6, 1001]) == [1000, 6, 0]
    assert (tokens.to_target[1000], tokens.to_target[5]) == (5, -1)


def test_ids_beyond_a_smaller_draft_model_are_its_first_token() -> None:
    assert map_tokens(TARGET, dict(TARGET), 800, target_size=1000).of_draft([3, 900]) == [3, 0]


def test_another_vocabulary_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"1,000 tokens and its 1,000, 1,000 are the same text and 0 have the same id"):
        map_tokens(TARGET, {text: 999 - number for text, number in TARGET.items()}, 1000, target_size=1000)


def test_what_a_draft_model_computes_beyond_its_target_has_no_counterpart() -> None:
    """Such a draft would be refused, and all drafts with it for a while."""
    tokens = map_tokens(TARGET | {"<added>": 1010}, TARGET | {"<added>": 1003}, 1008, target_size=1005)
    assert {tokens.to_target.get(number, number) for number in (1003, 1005, 1006, 1007)} == {-1}
    assert 1004 not in tokens.to_target
