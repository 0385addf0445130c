"""The law of speculation: drafts change the speed of a request and nothing else, whatever the method and feature."""

from __future__ import annotations

import random
from functools import cache
from itertools import product

import msgspec
import pytest

from engine.engine import Engine
from engine.speculation.controller import DraftController
from engine.speculation.draft_model import DraftModelProposer
from engine.speculation.speculator import Speculator
from engine.speculation.step_costs import StepCosts
from engine.types import Request, SamplingParams
from tests.support.answers import Answer, answer_all
from tests.support.speculating import FREE_ROWS, MAX_MODEL_LEN, METHODS, VOCAB_SIZE, make_draft_model, make_engine

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

WITH_DRAFTS = [method for method in METHODS if method != "none"]


def _requests(num: int = 16, **fields: object) -> list[Request]:
    """Some prompts begin alike, some repeat themselves; they end at once, late, or at the longest length."""
    rng = random.Random(1)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(14)]
    requests = []
    for i in range(num):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 16))]
        prompt = shared + own if i % 3 == 0 else own * 3 if i % 3 == 1 else own
        base = {"max_tokens": 1 + (7 * i) % 30, "temperature": 0.8 if i % 2 else 0.0}
        params = SamplingParams(seed=i * 77, **base | fields)
        requests.append(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    return requests


FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0, "max_tokens": 25},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "penalties": {"frequency_penalty": 0.5, "presence_penalty": 0.4, "repetition_penalty": 1.2},
    "logit_bias": {"logit_bias": {3: 4.0, 5: -100.0}},
    "allowed": {"allowed_token_ids": [1, 2, 3, 5, 8, 13]},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": [1, 2, 3, 4], "max_tokens": 25},
    "bad_words": {"bad_words": [[4], [5, 6], [7, 8, 9]], "max_tokens": 25},
    "stops": {"stop_token_ids": [2, 9, 11], "max_tokens": 30},
    "top_k, top_p, min_p": {"temperature": 1.2, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "max_tokens": 25},
    "max_model_len": {"max_tokens": 1000},
    "few drafts": {"num_drafts": 1, "max_tokens": 25},
    "no drafts": {"num_drafts": 0},
    "greedy and long": {"temperature": 0.0, "max_tokens": 60},
}


def _exactly(answers: dict[str, Answer]) -> dict[str, Answer]:
    """Tokens, and log-probabilities to the bit."""
    return {name: answers[name] for name in sorted(answers)}


@cache
def _alone(feature: str) -> dict[str, Answer]:
    """Each request by itself, without drafts."""
    found: dict[str, Answer] = {}
    for request in _requests(**FEATURES[feature]):
        found |= answer_all(make_engine("none"), [request]).answers
    return found


def _rounded(answers: dict[str, Answer]) -> dict[str, object]:
    """Torch's products of few and of many rows differ in their last bits; the compiled ones do not."""
    return {
        name: (
            tokens,
            [[(one.token_id, one.rank, round(one.logprob, 3)) for one in listed] for listed in (logprobs, prompt)],
        )
        for name, (tokens, logprobs, prompt) in sorted(answers.items())
    }


@pytest.mark.parametrize("method", WITH_DRAFTS)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_method_goes_with_every_feature(method: str, feature: str) -> None:
    """Sixteen at once, in chunks, cold and then warm."""
    engine = make_engine(method, budget=24)
    requests = _requests(**FEATURES[feature])
    first = answer_all(engine, requests, at_once=5)
    assert _rounded(first.answers) == _rounded(_alone(feature))
    assert engine.scheduler.kv.pool.num_owned == 0
    again = answer_all(engine, requests[:6])
    assert _rounded(again.answers) == _rounded({name: _alone(feature)[name] for name in again.answers})
    if feature == "greedy and long":
        assert first.num_accepted_drafts > 20
    if feature == "no drafts":
        assert engine.step()[2].num_draft_tokens == 0


@pytest.mark.parametrize("method", WITH_DRAFTS)
@pytest.mark.parametrize(("num_blocks", "budget", "is_auto"), [(32, 24, False), (32, 16, True), (300, 64, True)])
def test_scarce_memory_and_the_controller_change_nothing(
    method: str, num_blocks: int, budget: int, is_auto: bool
) -> None:
    engine = make_engine(method, num_blocks=num_blocks, budget=budget, is_auto=is_auto)
    found = answer_all(engine, _requests(), at_once=7)
    assert _rounded(found.answers) == _rounded(_alone("plain"))
    assert engine.scheduler.num_preemptions == 0 or num_blocks == 32
    assert engine.scheduler.kv.pool.num_owned == 0
    assert not engine.speculator.is_off


@pytest.mark.parametrize("method", WITH_DRAFTS)
def test_sliding_windows(method: str) -> None:
    expected = answer_all(make_engine("none", window=9), _requests())
    engine = make_engine(method, window=9, num_blocks=80, budget=20)
    assert answer_all(engine, _requests(), at_once=3).tokens == expected.tokens
    assert not engine.speculator.is_off


@pytest.mark.parametrize("method", WITH_DRAFTS)
def test_an_answer_goes_on_after_a_crash_as_if_nothing_had_happened(method: str) -> None:
    expected = _alone("plain")
    replayed = [
        msgspec.structs.replace(request, output_token_ids=expected[request.request_id][0][: i % 9])
        for i, request in enumerate(_requests())
        if len(expected[request.request_id][0]) > i % 9
    ]
    found = answer_all(make_engine(method), replayed, at_once=3).tokens
    for request in replayed:
        assert request.output_token_ids + found[request.request_id] == expected[request.request_id][0]


@pytest.mark.parametrize("method", WITH_DRAFTS)
def test_aborting_in_mid_step_frees_everything_and_disturbs_nobody(method: str) -> None:
    rng = random.Random(2)
    engine = make_engine(method, num_blocks=60, budget=20)
    requests = _requests(max_tokens=25)
    pending, aborted = list(requests), set()
    found: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while pending or engine.has_work:
        if pending:
            engine.add(pending.pop())
        for output in engine.step()[0]:
            found[output.request_id] += output.token_ids
        if rng.random() < 0.3 and engine.scheduler.running:
            victim = rng.choice(engine.scheduler.running).request.request_id
            engine.abort(victim)
            aborted.add(victim)
    assert 0 < len(aborted) < 16
    expected = answer_all(make_engine("none"), requests).tokens
    for name, tokens in found.items():
        whole = expected[name]
        assert tokens == (whole[: len(tokens)] if name in aborted else whole)
    assert engine.scheduler.kv.pool.num_owned == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", WITH_DRAFTS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("is_auto", [False, True])
def test_the_whole_matrix(method: str, feature: str, is_auto: bool) -> None:
    for num_blocks, budget, at_once in product((40, 300), (17, 24, 64), (1, 16)):
        engine = make_engine(method, num_blocks=num_blocks, budget=budget, is_auto=is_auto)
        for _ in range(2):
            found = answer_all(engine, _requests(**FEATURES[feature]), at_once=at_once)
            assert _rounded(found.answers) == _rounded(_alone(feature)), (num_blocks, budget, at_once)
        assert not engine.speculator.is_off


def _share_accepted(engine: Engine, requests: list[Request]) -> float:
    """Of the drafts that were verified."""
    for request in requests:
        engine.add(request)
    num_drafts = num_accepted = 0
    while engine.has_work:
        stats = engine.step()[2]
        num_drafts += stats.num_draft_tokens
        num_accepted += sum(stats.accepted_by_position)
    return num_accepted / num_drafts


def test_a_draft_model_that_is_the_target_is_always_right_at_any_temperature() -> None:
    """It samples with the target's noise: independent samples of one distribution would often differ."""
    shares = []
    for noise in (0.0, 0.1):
        engine = make_engine("none")
        proposer = DraftModelProposer(make_draft_model(300, noise=noise), num_drafts=4)
        engine.speculator = Speculator(proposer, VOCAB_SIZE)
        shares.append(_share_accepted(engine, _requests(temperature=1.0, max_tokens=40)))
    assert shares[0] == 1.0
    assert 0.3 < shares[1] < 0.97


def test_drafts_reach_the_longest_length_and_no_further() -> None:
    for method in WITH_DRAFTS:
        engine = make_engine(method)
        found = answer_all(engine, _requests(max_tokens=1000))
        for request in _requests():
            assert len(request.prompt_token_ids) + len(found.tokens[request.request_id]) == MAX_MODEL_LEN


@pytest.mark.parametrize("seed", range(6))
def test_a_draft_model_that_is_the_target_stays_right_whatever_becomes_of_blocks(seed: int) -> None:
    """Preemptions, aborts, prefixes of others, blocks that are given back, steps in which it is left out: what it
    believes to be in its cache is there."""
    rng = random.Random(seed)
    engine = make_engine("none", num_blocks=rng.choice((32, 40, 300)), budget=rng.choice((16, 24, 64)))
    proposer = DraftModelProposer(make_draft_model(300, noise=0.0), num_drafts=4)
    controller = DraftController(StepCosts(FREE_ROWS), max_rows=64, depth_costs_time=True)
    controller.depth = lambda num_seqs, num_other_rows, most: rng.choice((0, 1, 2, most))  # type: ignore[method-assign]
    engine.speculator = Speculator(proposer, VOCAB_SIZE, controller)
    requests = _requests(temperature=0.9, max_tokens=30)
    pending = [msgspec.structs.replace(one, request_id=f"{one.request_id} {i}") for i in range(2) for one in requests]
    num_drafts = num_accepted = 0
    while pending or engine.has_work:
        for _ in range(min(rng.randrange(3), len(pending))):
            engine.add(pending.pop())
        stats = engine.step()[2]
        num_drafts += stats.num_draft_tokens
        num_accepted += sum(stats.accepted_by_position)
        if engine.scheduler.running and rng.random() < 0.05:
            engine.abort(rng.choice(engine.scheduler.running).request.request_id)
        if engine.scheduler.running and rng.random() < 0.05:
            engine.scheduler._preempt(engine.scheduler.running[-1])
    assert num_accepted == num_drafts > 50
    assert not engine.speculator.is_off
