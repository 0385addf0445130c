"""Answers that follow a grammar: always, and the same ones whatever runs beside them, drafts for them, or ends."""

from __future__ import annotations

import json
import random
import re
import threading
from functools import cache

import msgspec
import pytest

from engine.engine import Engine
from engine.grammar import GrammarSpec
from engine.structured.grammar_states import GrammarStates
from engine.types import Request, SamplingParams, StepOutput
from tests.support.answers import answer_all
from tests.support.grammars import CHOICE, EOS, NESTED, NUMBER, OBJECT, TOKENS, make_compiler, text_of
from tests.support.speculating import METHODS, VOCAB_SIZE, make_engine

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")
SLOW = pytest.mark.slow
OTHER_SIZES = [(300, 24, False), (36, 16, True)]
SPECS = (OBJECT, NUMBER, CHOICE, NESTED)


def _follows(text: str, spec: GrammarSpec) -> bool:
    """Without the library that the engine uses."""
    if spec == OBJECT:
        value = json.loads(text)
        return (
            list(value) == ["abc", "b", "c"]
            and len(value["abc"]) <= 4
            and set(value["abc"]) <= {"a", "ab", "abc"}
            and -12 <= value["b"] <= 212
            and re.fullmatch("[abc]{2,9}", value["c"]) is not None
        )
    if spec == NESTED:
        return re.fullmatch(r"[\[\]a,]+", text) is not None and _is_nested(text.replace("a", "[]"))
    return re.fullmatch(NUMBER.text if spec == NUMBER else "abcabc|abba|cab|ab", text) is not None


def _is_nested(text: str) -> bool:
    return isinstance(json.loads(text), list)


def _requests(
    num: int = 16, *, specs: tuple[GrammarSpec | None, ...] = (*SPECS, None), **fields: object
) -> list[Request]:
    rng = random.Random(5)
    shared = [rng.randrange(VOCAB_SIZE - 1) for _ in range(14)]
    requests = []
    for i in range(num):
        own = [rng.randrange(VOCAB_SIZE - 1) for _ in range(rng.randrange(1, 12))]
        base = {"max_tokens": 60 if i % 4 else 8, "temperature": 1.0 if i % 2 else 0.0, "stop_token_ids": [EOS]}
        params = SamplingParams(seed=i * 31, grammar=specs[i % len(specs)], **base | fields)
        prompt = shared + own if i % 3 == 0 else own
        requests.append(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    return requests


@cache
def _alone() -> dict[str, list[int]]:
    """Each request by itself, without drafts."""
    found: dict[str, list[int]] = {}
    for request in _requests():
        engine = make_engine("none")
        engine.speculator.drafts_forced = False
        found |= answer_all(engine, [request]).tokens
    return found


def _run(engine: Engine, requests: list[Request]) -> dict[str, list[StepOutput]]:
    outputs: dict[str, list[StepOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step()[0]:
            outputs[output.request_id].append(output)
    return outputs


def test_answers_follow_their_grammars_and_stop_where_these_end() -> None:
    num_complete = 0
    for request, outputs in zip(_requests(40), _run(make_engine("none"), _requests(40)).values(), strict=True):
        spec = request.params.grammar
        tokens = [token for output in outputs for token in output.token_ids]
        last = outputs[-1]
        if spec is None:
            continue
        if last.finish_reason == "stop":
            num_complete += 1
            assert _follows(text_of(tokens), spec), text_of(tokens)
            assert EOS not in tokens[:-1]
        else:
            assert last.finish_reason == "length"
            assert len(tokens) == request.params.max_tokens
    assert num_complete > 20


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("num_blocks", "budget", "is_auto"), [(40, 24, False), *(pytest.param(*one, marks=SLOW) for one in OTHER_SIZES)]
)
def test_methods_batches_and_scarce_memory_change_nothing(
    method: str, num_blocks: int, budget: int, is_auto: bool
) -> None:
    engine = make_engine(method, num_blocks=num_blocks, budget=budget, is_auto=is_auto)
    found = answer_all(engine, _requests(), at_once=7)
    assert found.tokens == _alone()
    assert found.num_accepted_drafts > 0
    assert engine.scheduler.num_preemptions == 0 or num_blocks < 300
    assert engine.scheduler.kv.pool.num_owned == 0
    again = answer_all(engine, _requests(6))  # from the prefix cache
    assert again.tokens == {name: _alone()[name] for name in again.tokens}
    assert not engine.speculator.is_off


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_goes_on_after_a_crash_where_it_was(method: str) -> None:
    replayed = [
        msgspec.structs.replace(request, output_token_ids=_alone()[request.request_id][: i % 7])
        for i, request in enumerate(_requests())
        if len(_alone()[request.request_id]) > i % 7
    ]
    found = answer_all(make_engine(method), replayed, at_once=3).tokens
    for request in replayed:
        assert request.output_token_ids + found[request.request_id] == _alone()[request.request_id]


@pytest.mark.parametrize("method", ["none", "ngram", "medusa"])
def test_aborting_in_mid_step_disturbs_nobody(method: str) -> None:
    rng = random.Random(2)
    engine = make_engine(method, num_blocks=60, budget=20)
    pending, aborted = _requests(), set()
    found: dict[str, list[int]] = {request.request_id: [] for request in pending}
    while pending or engine.has_work:
        if pending:
            engine.add(pending.pop())
        for output in engine.step()[0]:
            found[output.request_id] += output.token_ids
        if rng.random() < 0.2 and engine.scheduler.running:
            victim = rng.choice(engine.scheduler.running).request.request_id
            engine.abort(victim)
            aborted.add(victim)
    assert 0 < len(aborted) < 16
    for name, tokens in found.items():
        assert tokens == (_alone()[name][: len(tokens)] if name in aborted else _alone()[name])
    assert engine.scheduler.kv.pool.num_owned == 0


def test_what_a_grammar_leaves_no_choice_about_takes_fewer_steps() -> None:
    """Also without a proposer: the only tokens that spell what must come are drafts."""
    requests = _requests(6, specs=(OBJECT,), max_tokens=60)
    num_steps = []
    for drafts in (False, True):
        engine = make_engine("none")
        if not drafts:
            engine.speculator.drafts_forced = False
        for request in requests:
            engine.add(request)
        number = 0
        while engine.has_work:
            engine.step()
            number += 1
        num_steps.append(number)
    assert num_steps[1] < 0.8 * num_steps[0]


def test_a_request_without_drafts_gets_none_of_its_grammar_either() -> None:
    engine = make_engine("none")
    found = answer_all(engine, _requests(8, specs=(OBJECT,), num_drafts=0))
    assert found.num_accepted_drafts == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 1.5, "presence_penalty": 0.4, "repetition_penalty": 1.3},
        {"logit_bias": {3: 9.0, 1: -100.0}},
        {"bad_words": [[3], [16, 4]]},
        {"min_tokens": 7},
        {"top_k": 3, "top_p": 0.8, "min_p": 0.01},
        {"logprobs": 2},
        {"temperature": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["medusa", *(pytest.param(name, marks=SLOW) for name in ("ngram", "draft_model"))])
def test_what_else_a_request_asks_for_goes_with_its_grammar(method: str, fields: dict[str, object]) -> None:
    requests = _requests(10, specs=(OBJECT, NESTED), **fields)
    plain = make_engine("none")
    plain.speculator.drafts_forced = False
    expected = _run(plain, requests)
    found = _run(make_engine(method), requests)
    for request in requests:
        name, spec = request.request_id, request.params.grammar
        tokens = [token for output in found[name] for token in output.token_ids]
        assert tokens == [token for output in expected[name] for token in output.token_ids]
        last = found[name][-1]
        assert last.finish_reason == expected[name][-1].finish_reason
        if last.finish_reason == "stop":
            assert spec is not None
            assert _follows(text_of(tokens), spec)
        if request.params.logprobs is not None:
            assert sum(len(output.logprobs or ()) for output in found[name]) == len(tokens)
        if "bad_words" in fields:
            assert TOKENS.index("a") not in tokens


@pytest.mark.parametrize("method", ["none", "ngram", "medusa"])
def test_without_an_end_of_text_an_answer_ends_where_its_grammar_does(method: str) -> None:
    """ignore_eos: the end-of-text token does not come, and what may go on goes on to its longest."""
    found = _run(make_engine(method), _requests(12, specs=(NUMBER, CHOICE), stop_token_ids=[], max_tokens=60))
    for i, outputs in enumerate(found.values()):
        tokens = [token for output in outputs for token in output.token_ids]
        assert EOS not in tokens
        assert outputs[-1].finish_reason == ("stop" if i % 2 else outputs[-1].finish_reason)
        if i % 2:
            assert text_of(tokens) in ("abcabc", "abba", "cab", "ab")
        else:  # digits for ever
            assert outputs[-1].finish_reason == "length"
            assert len(tokens) == 60


def test_where_all_is_forbidden_a_complete_answer_stops_and_an_incomplete_one_is_an_error() -> None:
    number = TOKENS.index("1")
    complete, incomplete = (
        Request(
            request_id=name,
            prompt_token_ids=[1, 2, 3],
            params=SamplingParams(
                seed=1, max_tokens=20, grammar=spec, allowed_token_ids=[number], stop_token_ids=[EOS], min_tokens=20
            ),
        )
        for name, spec in (("complete", GrammarSpec("regex", "11?2?")), ("incomplete", GrammarSpec("regex", "112")))
    )
    found = _run(make_engine("none"), [complete, incomplete])
    assert [token for output in found["complete"] for token in output.token_ids] == [number, number]
    assert found["complete"][-1].finish_reason == "stop"
    last = found["incomplete"][-1]
    assert (last.finish_reason, last.error_kind) == ("error", "constraints")
    assert "no token is allowed" in str(last.error)


def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone() -> None:
    engine = make_engine("ngram")
    requests = _requests(4)
    bad = msgspec.structs.replace(
        requests[0],
        request_id="bad",
        params=msgspec.structs.replace(requests[0].params, grammar=GrammarSpec("regex", "(?=a)b")),
    )
    found = _run(engine, [bad, *requests])
    (last,) = found.pop("bad")
    assert (last.finish_reason, last.error_kind) == ("error", "constraints")
    assert "look-ahead" in str(last.error)
    for name, outputs in found.items():
        assert [token for output in outputs for token in output.token_ids] == _alone()[name]
    assert engine.scheduler.kv.pool.num_owned == 0


def test_others_go_on_while_a_grammar_is_compiled() -> None:
    may_compile = threading.Event()

    def open_compiler() -> object:
        may_compile.wait(60)
        return make_compiler()

    engine = make_engine("none", grammars=GrammarStates(open_compiler))
    requests = _requests(5)
    for request in requests:
        engine.add(request)
    found: dict[str, list[int]] = {request.request_id: [] for request in requests}
    plain = next(request.request_id for request in requests if request.params.grammar is None)
    while not any(output.request_id == plain and output.finish_reason for output in _step(engine, found)):
        assert not may_compile.is_set()
    assert [name for name, tokens in found.items() if tokens] == [plain]
    engine.step()  # with nothing to do
    engine.abort("0")  # one that waits
    may_compile.set()
    while engine.has_work:
        _step(engine, found)
    assert found == {name: [] if name == "0" else tokens for name, tokens in _alone().items() if name in found}


def _step(engine: Engine, found: dict[str, list[int]]) -> list[StepOutput]:
    outputs = engine.step()[0]
    for output in outputs:
        found[output.request_id] += output.token_ids
    return outputs


def test_an_engine_without_a_vocabulary_refuses_grammars() -> None:
    engine = make_engine("none")
    engine.grammars = None
    with pytest.raises(ValueError, match="without grammars"):
        engine.add(_requests(1)[0])
