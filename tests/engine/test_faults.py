"""Whose fault a failed step is: a request's, which fails alone, or the device's, which ends the process.

What a failed step had noted by then is not believed afterwards; `test_fault_injection.py` tries every place.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.batch.step_inputs import StepInputs
from engine.client.client import EngineClient, EngineState
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.faults import EngineFaultError
from engine.sampling.token_counts import CountKeeper, TokenCounts
from engine.types import Request, SamplingParams, Scheduled, Sequence, StepOutput
from tests.support import faulty_device
from tests.support.scripted_client import QUICK, Recorder, read_one, until

BAD = 63  # a prompt token of requests that cannot be computed


def requests(num: int = 5, *, max_tokens: int = 10) -> list[Request]:
    """Of every kind that has a state of its own in a step: penalties, words, scores, repetition for n-grams."""
    rng = random.Random(5)
    kinds: list[dict[str, object]] = [
        {},
        {"frequency_penalty": 0.5, "repetition_penalty": 1.3},
        {"presence_penalty": 1.0, "bad_words": [[3, 4], [5]]},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"top_k": 7, "top_p": 0.9, "logit_bias": {1: 2.0}},
    ]
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=[rng.randrange(8) for _ in range(3 + 9 * i)],
            params=SamplingParams(seed=i, max_tokens=max_tokens, temperature=0.9, **kinds[i % len(kinds)]),
        )
        for i in range(num)
    ]


def run(engine: Engine, added: list[Request]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """(tokens, errors) by request"""
    tokens: dict[str, list[int]] = defaultdict(list)
    errors: dict[str, str] = {}
    for request in added:
        engine.add(request)
    while engine.has_work:
        for output in engine.step()[0]:
            tokens[output.request_id] += output.token_ids
            if output.error:
                errors[output.request_id] = output.error
    assert engine.scheduler.kv.pool.num_owned == 0
    return dict(tokens), errors


def has_bad(batch: list[Scheduled]) -> bool:
    return any(BAD in item.seq.request.prompt_token_ids for item in batch)


def fail_with_bad(batch: list[Scheduled]) -> None:
    if has_bad(batch):
        raise RuntimeError("shape '[3]' is invalid")


def bad_request(name: str = "bad") -> Request:
    params = SamplingParams(seed=0, max_tokens=4, temperature=0.0, bad_words=[[BAD]])
    return Request(request_id=name, prompt_token_ids=[1, BAD, 2], params=params)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_error_of_the_device_ends_the_process_in_whichever_step_it_comes(overlap: bool) -> None:
    for last in (0, 1, 4):
        engine = faulty_device.make_engine(overlap=overlap)
        seen: list[int] = []

        def before(batch: list[Scheduled], seen=seen, last=last) -> None:
            seen.append(len(batch))
            if len(seen) > last:
                faulty_device.lose_device()

        engine.executor.runner.before = before
        with pytest.raises(EngineFaultError, match="illegal memory access"):
            run(engine, requests(3))


def test_a_device_s_error_behind_another_is_seen() -> None:
    def before(batch: list[Scheduled]) -> None:
        try:
            faulty_device.lose_device()
        except RuntimeError as error:
            raise ValueError("could not launch") from error

    engine = faulty_device.make_engine()
    engine.executor.runner.before = before
    with pytest.raises(EngineFaultError, match="the device failed"):
        run(engine, requests(1))


def test_a_device_s_error_is_seen_where_tokens_are_awaited() -> None:
    class LateError:
        def __init__(self, sampler) -> None:
            self._sampler = sampler

        def launch(self, *arguments):
            self._sampler.launch(*arguments)
            return SimpleNamespace(finish=faulty_device.lose_device, tokens=None)

    engine = faulty_device.make_engine()
    engine.executor.sampler = LateError(engine.executor.sampler)
    with pytest.raises(EngineFaultError):
        run(engine, requests(2))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_others", [0, 1, 4])
def test_a_bad_request_fails_alone_even_where_it_is_alone(overlap: bool, num_others: int) -> None:
    expected, _ = run(faulty_device.make_engine(), requests(num_others))
    engine = faulty_device.make_engine(overlap=overlap)
    engine.executor.runner.before = fail_with_bad
    tokens, errors = run(engine, [*requests(num_others), bad_request()])
    assert list(errors) == ["bad"]
    assert {name: tokens.get(name, []) for name in expected} == expected


def test_where_every_one_of_several_fails_alone_it_is_nobody_s_fault() -> None:
    engine = faulty_device.make_engine()
    engine.executor.runner.before = fail_with_bad
    blamed: list[list[str]] = []
    engine.on_batch = lambda batch: blamed.append([item.seq.request.request_id for item in batch])
    with pytest.raises(EngineFaultError, match="none of theirs"):
        run(engine, [bad_request("a"), bad_request("b")])
    assert blamed[-1] == ["a", "b"], "no single one of them is under suspicion more than the other"


def test_where_not_even_a_token_of_nobody_s_can_be_computed_the_process_ends() -> None:
    engine = faulty_device.make_engine()
    fails = [False]

    def before(batch: list[Scheduled]) -> None:
        fails[0] = fails[0] or has_bad(batch)
        if fails[0]:
            raise RuntimeError("it sticks")

    engine.executor.runner.before = before
    with pytest.raises(EngineFaultError, match="no step succeeds any more"):
        run(engine, [bad_request()])


def test_launching_ahead_is_tried_again_after_it_failed() -> None:
    num_launched, fails = [0], [True]
    engine = faulty_device.make_engine(overlap=True)
    forward = engine.executor.runner.forward

    def forward_or_fail(inputs: StepInputs, tokens: Tensor | None = None):
        if tokens is not None and fails[0]:
            raise RuntimeError("not now")
        num_launched[0] += tokens is not None
        return forward(inputs, tokens)

    engine.executor.runner.forward = forward_or_fail
    expected, _ = run(faulty_device.make_engine(), requests(1, max_tokens=60))
    assert run(engine, requests(1, max_tokens=60)) == (expected, {})
    assert engine.degraded_modes == ["run_ahead"]
    fails[0] = False
    for _ in range(30):
        assert run(engine, requests(1, max_tokens=60)) == (expected, {})
    assert engine.degraded_modes == []
    assert num_launched[0] > 100


async def test_requests_survive_a_lost_device_and_health_says_what_happens(tmp_path: Path) -> None:
    observer = Recorder()
    config = EngineConfig(model=ModelConfig(path=str(tmp_path)))
    limits = QUICK
    client = EngineClient(config, observer, limits=limits, factory=f"{faulty_device.__file__}:build")
    await client.start()
    try:
        await until(lambda: client.state is EngineState.READY, seconds=60)
        states: list[EngineState] = []

        async def stream(request: Request) -> list[StepOutput]:
            return [output async for output in read_one(client, request)]

        async def watch() -> None:
            while True:
                states.append(client.state)
                await asyncio.sleep(0.005)

        watching = asyncio.create_task(watch())
        outputs = await asyncio.gather(*map(stream, requests(4)))
        watching.cancel()
    finally:
        await client.stop()
    expected, _ = run(faulty_device.make_engine(), requests(4))
    tokens = [[token for output in each for token in output.token_ids] for each in outputs]
    assert {str(i): each for i, each in enumerate(tokens)} == expected
    assert EngineState.RESTARTING in states, "it was not ready in between"
    (reason,) = observer.deaths
    assert "illegal memory access" in reason


class FailingAllocation:
    """torch.zeros and the like fail at the so-manieth call, from this thread's `states`."""

    def __init__(self, number: int) -> None:
        self.number, self.num_calls = number, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "c_call" and frame.f_code.co_filename.endswith(("token_counts.py", "device_inputs.py")):
            self.num_calls += 1
            if self.num_calls == self.number:
                sys.setprofile(None)
                raise torch.OutOfMemoryError("no memory left")


def penalised(seqs: list[Sequence], paths: list[list[int]]) -> list[tuple[int, Scheduled, list[int]]]:
    """A sampled row of each sequence, behind the drafts of a path."""
    items = [Scheduled(seq, 1, len(path), samples=True) for seq, path in zip(seqs, paths, strict=True)]
    return [(row, item, path) for row, (item, path) in enumerate(zip(items, paths, strict=True))]


@pytest.mark.parametrize("number", range(1, 60))
def test_counts_of_penalties_are_right_after_any_failure(number: int) -> None:
    vocab_size, rng = 12, random.Random(number)
    keeper, counts = CountKeeper(), TokenCounts(vocab_size)
    seqs: list[Sequence] = []
    device = torch.device("cpu")
    for step in range(12):
        if step % 2 == 0:
            params = SamplingParams(seed=0, max_tokens=50, frequency_penalty=1.0)
            prompt = [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 5))]
            seqs.append(Sequence(Request(request_id=str(step), prompt_token_ids=prompt, params=params), list(prompt)))
        if step in (5, 8):
            del seqs[rng.randrange(len(seqs))]  # its place is another's soon
        paths = [[rng.randrange(vocab_size)] if rng.random() < 0.3 else [] for _ in seqs]
        rows = penalised(seqs, paths)
        if step == rng.randrange(12) or step == 6:
            sys.setprofile(FailingAllocation(number))
            try:
                counts.change(keeper.changes(rows, num_rows=len(rows)), None, device)
            except torch.OutOfMemoryError:
                keeper.forget(seqs)
            finally:
                sys.setprofile(None)
        states = counts.change(keeper.changes(rows, num_rows=len(rows)), None, device).tolist()
        for seq, path, state in zip(seqs, paths, states, strict=True):
            output = seq.token_ids[seq.num_prompt_tokens :] + path
            assert counts.counts[state].tolist() == [output.count(token) for token in range(vocab_size)]
            assert counts.is_in_prompt[state].tolist() == [t in seq.request.prompt_token_ids for t in range(vocab_size)]
        for seq in seqs:
            seq.token_ids += [rng.randrange(vocab_size) for _ in range(rng.randrange(3))]
        rows = []
