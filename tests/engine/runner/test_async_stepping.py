"""Steps that are launched before the last one's tokens are known: the same output, whatever happens in between."""

import random
from collections import defaultdict
from collections.abc import Iterator

import msgspec
import pytest
import torch

from engine.attention.torch_backend import TorchAttention
from engine.engine import Engine
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.layer_spec import windows_of
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.runner.model_runner import ModelRunner
from engine.sampling.host_sampler import HostSampler
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.prompt_pacing import PromptPacing
from engine.scheduling.scheduler import Scheduler
from engine.speculation.ngram import NgramProposer
from engine.speculation.no_proposer import NoProposer
from engine.types import Request, SamplingParams, StepOutput
from tests.support.grammars import EOS, NESTED, OBJECT, make_grammars
from tests.support.paced_world import make_times
from tests.support.stepping import engine_of
from tests.support.tiny_llamas import COST, VOCAB_SIZE, make_model

BLOCK_SIZE = 4


NUM_PROMPT_TOKENS = 5  # of the requests that `_add` makes


class CountingRunner(ModelRunner):
    """Counts the forward passes, and those whose tokens came from the device."""

    num_passes = num_ahead = 0

    def forward(self, inputs, tokens=None):
        self.num_passes += 1
        self.num_ahead += tokens is not None
        return super().forward(inputs, tokens)


def _make_engine(name: str = "full", *, overlap: bool, num_blocks: int = 200, budget: int = 48) -> Engine:
    model = make_model(name)
    cache = KVCache(
        model.attention_layers, num_blocks=num_blocks, block_size=BLOCK_SIZE, codec=DenseCodec(torch.float32)
    )
    kv = KVCacheManager(num_blocks, BLOCK_SIZE, windows=windows_of(model.attention_layers))
    limits = SchedulerLimits(max_num_seqs=6, max_num_batched_tokens=budget, max_model_len=60, headroom=1)
    runner = CountingRunner(model, cache, TorchAttention(cache))
    scheduler, sampler, grammars = Scheduler(kv, limits), HostSampler(VOCAB_SIZE), make_grammars(VOCAB_SIZE)
    return engine_of(runner, scheduler, sampler, NoProposer(), COST, overlap=overlap, grammars=grammars)


def _random_params(rng: random.Random, seed: int) -> SamplingParams:
    """Of many kinds; stop tokens are likely, penalties need the text."""
    return SamplingParams(
        seed=seed,
        max_tokens=rng.choice([1, 2, 12, 40]),
        min_tokens=rng.choice([0, 0, 1, 5]),
        temperature=rng.choice([0.0, 0.8]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 5]),
        repetition_penalty=rng.choice([1.0] * 14 + [1.3]),
        logit_bias={3: 2.0} if rng.random() < 0.3 else {},
        bad_words=[[5, 6]] if rng.random() < 0.05 else [],
        stop_token_ids=rng.sample(range(VOCAB_SIZE), rng.choice([0, 1, 3])),
        logprobs=rng.choice([None, None, 2]),
        prompt_logprobs=rng.choice([None] * 5 + [1]),
    )


def _random_requests(rng: random.Random, count: int) -> list[Request]:
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(13)]
    requests = []
    for i in range(count):
        tail = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 20))]
        prompt = shared + tail if rng.random() < 0.4 else tail
        priority = rng.choice([0, 0, 0, 1])
        params = _random_params(rng, seed=i)
        requests.append(Request(request_id=str(i), prompt_token_ids=prompt, params=params, priority=priority))
    return requests


def _run(engine: Engine, requests: list[Request], schedule_seed: int) -> dict[str, list[StepOutput]]:
    """Adds and aborts at random, and runs until nothing is left. What was aborted is not in the result."""
    rng = random.Random(schedule_seed)
    outputs: dict[str, list[StepOutput]] = defaultdict(list)
    pending, aborted = list(requests), set()
    while pending or engine.has_work:
        for _ in range(rng.choice([0, 0, 0, 1, 5])):
            if pending:
                engine.add(pending.pop(0))
        for output in engine.step()[0]:
            outputs[output.request_id].append(output)
        for request in requests:
            if rng.random() < 0.002:
                engine.abort(request.request_id)
                aborted.add(request.request_id)
    engine.step()
    assert engine.scheduler.kv.pool.num_owned == 0
    return {request_id: found for request_id, found in outputs.items() if request_id not in aborted}


def _tokens(outputs: list[StepOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def _logprobs(outputs: list[StepOutput]) -> Iterator[float]:
    yield from (entry.logprob for output in outputs for entry in output.prompt_logprobs or [])
    yield from (entry.logprob for output in outputs for entry in output.logprobs or [])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("model", "num_blocks", "budget"), [("full", 200, 48), ("full", 24, 9), ("window", 40, 20), ("mixed", 60, 20)]
)
def test_a_random_workload_says_the_same_with_and_without_overlap(model, num_blocks, budget, seed):
    requests = _random_requests(random.Random(seed), 24)
    engine = _make_engine(model, overlap=True, num_blocks=num_blocks, budget=budget)
    found = _run(engine, requests, schedule_seed=seed)
    expected = _run(_make_engine(model, overlap=False), requests, schedule_seed=1000)
    both = found.keys() & expected.keys()
    assert len(both) > 8
    for request_id in both:
        assert _tokens(found[request_id]) == _tokens(expected[request_id])
        assert found[request_id][-1].finish_reason == expected[request_id][-1].finish_reason
        assert found[request_id][-1].stop_token_id == expected[request_id][-1].stop_token_id
        assert list(_logprobs(found[request_id])) == pytest.approx(list(_logprobs(expected[request_id])), abs=1e-4)
    assert engine.executor.runner.num_ahead > 0
    if num_blocks == 24:
        assert engine.scheduler.num_preemptions > 0
    if model == "full":
        assert engine.scheduler.num_prefix_hits > 0


@pytest.mark.parametrize(("num_blocks", "budget", "seed"), [(200, 48, 0), (24, 12, 1)])
def test_a_target_for_the_wait_between_tokens_is_foreseen_and_changes_nothing_that_is_said(num_blocks, budget, seed):
    requests = _random_requests(random.Random(seed), 16)
    engine = _make_engine(overlap=True, num_blocks=num_blocks, budget=budget)
    engine.scheduler.pacing = PromptPacing(make_times(), target=0.03)
    limits = set()
    step = engine.step

    def noted():
        report = step()
        limits.add(report[2].prompt_limit)
        return report

    engine.step = noted
    found = _run(engine, requests, schedule_seed=seed)
    expected = _run(_make_engine(overlap=False), requests, schedule_seed=1000)
    both = found.keys() & expected.keys()
    assert len(both) > 5
    assert all(_tokens(found[request_id]) == _tokens(expected[request_id]) for request_id in both)
    assert engine.executor.runner.num_ahead > 0
    assert limits & {"target", "least", "none"}


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_follow_a_grammar_wait_for_the_tokens_before_them(seed: int) -> None:
    """Beside others, which are launched ahead whenever they are alone."""
    requests = [
        msgspec.structs.replace(
            request, params=msgspec.structs.replace(request.params, grammar=grammar, stop_token_ids=[EOS], bad_words=[])
        )
        for request, grammar in zip(
            _random_requests(random.Random(seed), 20), [OBJECT, None, None, NESTED, None] * 4, strict=True
        )
    ]
    engine = _make_engine(overlap=True)
    found = _run(engine, requests, schedule_seed=seed)
    expected = _run(_make_engine(overlap=False), requests, schedule_seed=1000)
    both = found.keys() & expected.keys()
    assert len(both) > 8
    for request_id in both:
        assert _tokens(found[request_id]) == _tokens(expected[request_id])
        assert found[request_id][-1].finish_reason == expected[request_id][-1].finish_reason
    assert engine.executor.runner.num_ahead > 0


def _add(engine: Engine, request_id: str, **fields: object) -> None:
    params = SamplingParams(**{"seed": 0, "max_tokens": 10, "temperature": 0.0, **fields})
    prompt = [(int(request_id) * 7 + i) % VOCAB_SIZE for i in range(NUM_PROMPT_TOKENS)]
    engine.add(Request(request_id=request_id, prompt_token_ids=prompt, params=params))


def _finish(engine: Engine) -> dict[str, list[int]]:
    outputs: dict[str, list[int]] = defaultdict(list)
    while engine.has_work:
        for output in engine.step()[0]:
            assert output.error is None
            outputs[output.request_id] += output.token_ids
    return outputs


def test_every_decoding_step_but_the_first_is_launched_ahead():
    engine = _make_engine(overlap=True)
    for request_id in "012":
        _add(engine, request_id)
    _finish(engine)
    assert (engine.executor.runner.num_passes, engine.executor.runner.num_ahead) == (
        10,
        9,
    )  # nothing is launched past max_tokens


def test_a_stop_token_costs_one_row_and_no_pass():
    engine = _make_engine(overlap=False)
    _add(engine, "0")
    _add(engine, "1")
    tokens = _finish(engine)
    stop = next(token for token in tokens["0"] if token not in tokens["1"])
    engine = _make_engine(overlap=True)
    _add(engine, "0", stop_token_ids=[stop])
    _add(engine, "1")
    found = _finish(engine)
    assert found == {"0": tokens["0"][: tokens["0"].index(stop) + 1], "1": tokens["1"]}
    assert engine.executor.runner.num_passes == 10


def test_a_request_that_comes_meanwhile_is_computed_beside_what_runs():
    engine = _make_engine(overlap=True)
    _add(engine, "0")
    engine.step()
    engine.step()
    _add(engine, "1")
    outputs = engine.step()[0]
    assert [output.request_id for output in outputs] == ["0", "1"]
    alone = _make_engine(overlap=False)
    _add(alone, "1")
    assert outputs[1].token_ids + _finish(engine)["1"] == _finish(alone)["1"]


def test_requests_that_need_the_text_before_them_wait_for_it():
    engine = _make_engine(overlap=True)
    _add(engine, "0")
    _add(engine, "1", presence_penalty=0.5, max_tokens=6)
    for _ in range(5):
        engine.step()
    assert engine.executor.runner.num_ahead == 0
    _finish(engine)
    assert engine.executor.runner.num_ahead == 4  # the first one alone needs no text


def test_nothing_is_launched_ahead_where_memory_is_short():
    """The scheduler decides who gives way, when it knows who has ended."""
    engine = _make_engine(overlap=True, num_blocks=17)  # of 4 tokens, one of them reserved: 60 tokens and one block
    _add(engine, "0", max_tokens=50)
    _add(engine, "1", max_tokens=50)
    num_preemptions, num_owned = 0, 0
    while engine.has_work:
        engine.step()
        num_owned = max(num_owned, engine.scheduler.kv.pool.num_owned)
        num_preemptions = engine.scheduler.num_preemptions
    assert num_owned == 16
    assert num_preemptions > 0


class FailingAheadRunner(CountingRunner):
    def forward(self, inputs, tokens=None):
        if tokens is not None:
            raise RuntimeError("not today")
        return super().forward(inputs, tokens)


def test_a_launch_that_fails_is_given_up_and_harms_no_request(caplog):
    expected = _make_engine(overlap=False)
    engine = _make_engine(overlap=True)
    engine.executor.runner.__class__ = FailingAheadRunner
    for each in (expected, engine):
        _add(each, "0")
        _add(each, "1")
    assert _finish(engine) == _finish(expected)
    assert len([record for record in caplog.records if "launched ahead" in record.message]) == 1


class BrokenSampler(HostSampler):
    """Fails for the request of seed 1 once it has said three tokens, whether it is asked ahead of time or not."""

    def launch(self, logits, inputs, newest=None):
        if (inputs.positions[inputs.facts.seeds == 1] >= NUM_PROMPT_TOKENS + 3).any():
            raise RuntimeError("broken")
        return super().launch(logits, inputs, newest)


def test_a_request_that_fails_while_steps_run_ahead_fails_alone():
    engine = _make_engine(overlap=True)
    broken = engine_of(
        engine.executor.runner, engine.scheduler, BrokenSampler(VOCAB_SIZE), NoProposer(), COST, overlap=True
    )
    expected = _make_engine(overlap=False)
    for each in (expected, broken):
        _add(each, "0")
        _add(each, "1", seed=1)
    errors, outputs = [], defaultdict(list)
    while broken.has_work:
        for output in broken.step()[0]:
            outputs[output.request_id] += output.token_ids
            errors += [output.request_id] if output.error else []
    assert errors == ["1"]
    answers = _finish(expected)
    assert outputs == {"0": answers["0"], "1": answers["1"][:3]}


def test_a_model_that_gives_no_numbers_ends_in_an_error_while_steps_run_ahead():
    """The row that was launched ahead of the bad one computes with a token that was never sampled."""
    engine = _make_engine(overlap=True)
    _add(engine, "0", logit_bias={token: float("-inf") for token in range(VOCAB_SIZE)})
    _add(engine, "1")
    results = {}
    while engine.has_work:
        for output in engine.step()[0]:
            if output.finish_reason:
                results[output.request_id] = output.finish_reason
    assert results == {"0": "error", "1": "length"}


def test_overlap_and_drafts_exclude_each_other():
    engine = _make_engine(overlap=False)
    proposer = NgramProposer(num_drafts=2, ngram_min=1, ngram_max=2)
    with pytest.raises(AssertionError):
        engine_of(engine.executor.runner, engine.scheduler, engine.executor.sampler, proposer, COST, overlap=True)
