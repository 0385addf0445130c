"""Masks of rows and drafts, against a grammar that is compiled anew and told the same tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.grammar import GrammarSpec
from engine.structured.compiled_grammars import MAX_KEPT, CompiledGrammars
from engine.structured.grammar_states import GrammarStates
from engine.types import Request, Sampled, SamplingParams, Scheduled, Sequence
from tests.support.grammars import EOS, NESTED, NUMBER, OBJECT, TOKENS, make_compiler, make_grammars

COMPILER = make_compiler()
SPECS = (OBJECT, NUMBER, NESTED)


def allowed_after(spec: GrammarSpec, token_ids: list[int]) -> set[int]:
    """By a matcher of its own."""
    matcher = COMPILER.compile(spec).deep_copy()
    assert matcher.try_consume_tokens(token_ids) == len(token_ids)
    word = int(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)[0])
    return {token for token in range(len(TOKENS)) if word >> token & 1}


def spells(spec: GrammarSpec, token_ids: list[int]) -> bool:
    """Whether the grammar allows what the tokens spell. (Where it leaves no choice, a mask has one of several ways.)"""
    return COMPILER.compile(spec).deep_copy().try_consume_tokens(token_ids) == len(token_ids)


def open_sequence(states: GrammarStates, spec: GrammarSpec | None, output: list[int], **fields: object) -> Sequence:
    params = SamplingParams(**{"seed": 1, "max_tokens": 100, "grammar": spec, "stop_token_ids": [EOS], **fields})
    request = Request(request_id="r", prompt_token_ids=[5, 6], params=params, output_token_ids=output)
    seq = Sequence(request, [5, 6, *output], stop_token_ids=frozenset(params.stop_token_ids))
    states.open(seq)
    while not states.is_ready(seq):
        states.wait(1.0)
        assert states.take_failed() == []
    return seq


def random_path(rng: random.Random, spec: GrammarSpec, length: int, before: list[int]) -> list[int]:
    path: list[int] = []
    for _ in range(length):
        choices = sorted(allowed_after(spec, before + path) - {EOS})
        if not choices:
            break
        path.append(rng.choice(choices))
    return path


def random_tree(rng: random.Random, spec: GrammarSpec, before: list[int], size: int) -> tuple[list[int], list[int]]:
    """Drafts that the grammar allows."""
    tokens: list[int] = []
    parents: list[int] = []
    paths: list[list[int]] = [[]]
    for _ in range(size):
        parent = rng.randrange(-1, len(tokens))
        choices = sorted(allowed_after(spec, before + paths[parent + 1]) - {EOS})
        if choices:
            tokens.append(rng.choice(choices))
            parents.append(parent)
            paths.append([*paths[parent + 1], tokens[-1]])
    return tokens, parents


def item_of(seq: Sequence) -> Scheduled:
    return Scheduled(seq, 1 + len(seq.draft_token_ids), len(seq.draft_token_ids), samples=True)


@pytest.mark.parametrize("is_tree", [False, True])
def test_each_row_has_the_mask_of_the_text_with_the_drafts_on_its_path(is_tree: bool) -> None:
    rng = random.Random(3)
    states = make_grammars()
    for _ in range(12):
        batch: list[Scheduled] = []
        expected: list[set[int]] = []
        rows: list[int] = []
        for spec in (*SPECS, None):
            output = random_path(rng, spec, rng.randrange(6), []) if spec else []
            seq = open_sequence(states, spec, output)
            if spec is not None:
                tree = random_tree(rng, spec, output, rng.randrange(7))
                drafts = random_path(rng, spec, rng.randrange(5), output)
                seq.draft_token_ids, seq.draft_parents = tree if is_tree else (drafts, list(range(-1, len(drafts) - 1)))
            first = sum(item.num_sampled_rows for item in batch)
            paths = [[]]
            for token, parent in zip(seq.draft_token_ids, seq.draft_parents, strict=True):
                paths.append([*paths[parent + 1], token])
            if spec is not None:
                rows += range(first, first + len(paths))
                expected += [allowed_after(spec, output + path) for path in paths]
            batch.append(item_of(seq))
        masks = states.masks(batch)
        again = states.masks(batch)  # as of a step that failed
        assert masks is not None
        assert again is not None
        assert masks.rows.tolist() == rows
        assert np.array_equal(masks.words(), again.words())
        forbidden = masks.forbidden(len(TOKENS))
        assert [set(np.flatnonzero(~row).tolist()) for row in forbidden] == expected


@pytest.mark.parametrize("spec", SPECS)
def test_drafts_are_cut_where_they_break_the_grammar(spec: GrammarSpec) -> None:
    rng = random.Random(4)
    states = make_grammars()
    num_cut = num_kept = 0
    for _ in range(40):
        output = random_path(rng, spec, rng.randrange(6), [])
        seq = open_sequence(states, spec, output)
        valid, parents = random_tree(rng, spec, output, 5)
        tokens = [token if rng.random() < 0.7 else rng.randrange(len(TOKENS)) for token in valid]
        seq.draft_token_ids, seq.draft_parents = list(tokens), list(parents)
        seq.draft_confidences = [0.1 * i for i in range(len(tokens))]
        states.constrain([seq])
        expected: list[tuple[int, ...]] = []
        paths: list[list[int] | None] = [[]]
        for token, parent in zip(tokens, parents, strict=True):
            before = paths[parent + 1]
            fits = before is not None and EOS not in before and spells(spec, [*output, *before, token])
            paths.append([*before, token] if fits and before is not None else None)
        expected = [tuple(path) for path in paths[1:] if path is not None]
        found: list[list[int]] = [[]]
        for token, parent in zip(seq.draft_token_ids, seq.draft_parents, strict=True):
            found.append([*found[parent + 1], token])
        assert [tuple(path) for path in found[1:]] == expected
        assert len(seq.draft_confidences) == len(expected)
        num_cut += len(tokens) - len(expected)
        num_kept += len(expected)
    assert num_cut > 5
    assert num_kept > 5


def test_what_is_sampled_is_followed_and_the_end_cut_off() -> None:
    states = make_grammars()
    seq = open_sequence(states, GrammarSpec("regex", "abc"), [])
    sampled = [Sampled([TOKENS.index("ab"), TOKENS.index("c"), TOKENS.index("a")], [0, 1])]
    states.follow([item_of(seq)], sampled)
    assert (sampled[0].token_ids, sampled[0].is_over) == ([TOKENS.index("ab"), TOKENS.index("c")], True)


def test_a_token_that_the_grammar_forbids_is_an_error_and_never_text() -> None:
    states = make_grammars()
    seq = open_sequence(states, GrammarSpec("regex", "abc"), [])
    sampled = [Sampled([TOKENS.index("ab"), TOKENS.index("a")])]
    states.follow([item_of(seq)], sampled)
    assert sampled[0].error_kind == "constraints"
    assert sampled[0].token_ids == []


def test_forced_tokens_are_those_that_spell_what_must_come() -> None:
    states = make_grammars()
    seq = open_sequence(states, OBJECT, [])
    assert [TOKENS[token] for token in states.forced(seq)] == ['{"', "abc", '":', "["]
    assert states.forced(open_sequence(states, None, [])) == []
    assert states.forced(open_sequence(states, NUMBER, [])) == []


def test_a_text_that_does_not_follow_its_grammar_is_said_to() -> None:
    states = make_grammars()
    params = SamplingParams(seed=1, max_tokens=9, grammar=NUMBER)
    request = Request(request_id="r", prompt_token_ids=[5], params=params, output_token_ids=[TOKENS.index("a")])
    seq = Sequence(request, [5, TOKENS.index("a")])
    states.open(seq)
    found = []
    while not states.is_ready(seq):
        states.wait(1.0)
        found += states.take_failed()
    assert [(one, "do not follow" in reason) for one, reason in found] == [(seq, True)]


def test_grammars_are_kept_for_those_who_ask_again_within_bounds() -> None:
    opened = []

    def open_compiler() -> object:
        opened.append(1)
        return COMPILER

    grammars = CompiledGrammars(open_compiler)
    for number in range(MAX_KEPT + 10):
        spec = GrammarSpec("regex", f"a{{{number}}}")
        first = grammars.follow(spec, [])
        assert first.result() is not grammars.follow(spec, []).result()
        assert grammars.follow(spec, []).done()
    assert opened == [1]
    assert not grammars.follow(GrammarSpec("regex", "a{0}"), []).done() or len(grammars._kept) <= MAX_KEPT
    assert len(grammars._kept) <= MAX_KEPT


def test_where_no_request_has_a_grammar_nothing_is_made() -> None:
    states = GrammarStates(lambda: pytest.fail("the compiler was made"))
    seq = open_sequence(states, None, [])
    assert states.masks([item_of(seq)]) is None
    assert not states.has_any
