"""Decoding and prefill through the real engine on random weights, and through transformers' continuous batching."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.runner.cuda_graphs import NUM_STEPS_BETWEEN, NUM_USES
from engine.types import Request, SamplingParams
from loadtest.gpu.context import Context, Job
from loadtest.gpu.end_to_end import (
    TOKENS_PER_STEP,
    Case,
    allow,
    cases_of,
    decode_floor,
    num_prefill_steps,
    prefill_floor,
    random_prompts,
)
from loadtest.gpu.records import Problem, Record, Timing
from loadtest.gpu.shapes import Load, load_of
from loadtest.gpu.transformers_times import time_transformers
from loadtest.micro.shapes import Shape

_WARM_UP = NUM_STEPS_BETWEEN + NUM_USES + 8  # outputs, after which a batch's graph is captured
_SHORT = 40  # tokens of a prompt that only warms up


def jobs(context: Context) -> list[Job]:
    load = load_of(is_rehearsal=context.is_rehearsal)
    works = [(shape.name, _time_engine, shape) for shape in load.shapes]
    works += [(f"{shape.name}, transformers", time_transformers, shape) for shape in load.shapes]
    return [
        Job(name, partial(time_shape, context, shape, load, num_jobs_left=len(works) - number))
        for number, (name, time_shape, shape) in enumerate(works)
    ]


def _time_engine(context: Context, shape: Shape, load: Load, *, num_jobs_left: int) -> Iterator[Record]:
    allowance = allow(context, num_jobs_left=num_jobs_left, overhead=1.0)
    started = time.perf_counter()
    with shape.folder(max_length=load.max_length) as folder:
        settings = {
            "model": {"path": str(folder), "load_format": "dummy"},
            "scheduler": {"max_num_seqs": max(load.batches), "max_num_batched_tokens": TOKENS_PER_STEP},
        }
        if context.is_rehearsal:
            settings["device"] = {"name": "cpu", "num_threads": 1, "kernels": "torch"}
        engine, info = build_engine(EngineConfig.model_validate(settings), lambda phase, detail: None)
    yield Timing(f"start, {shape.name}", time.perf_counter() - started)
    warmed_up: set[int] = set()
    for case in cases_of(load):
        if case.batch * load.max_length > info.num_kv_tokens:
            yield Problem(f"{shape.name}, {case}", f"the KV cache holds {info.num_kv_tokens} tokens")
        elif not allowance.has_room_for(shape, case, load.num_outputs):
            yield Problem(f"{shape.name}, {case}", "left out for want of time")
        else:
            if case.batch not in warmed_up:
                warmed_up.add(case.batch)
                _warm_up(context, engine, shape, case, max_length=load.max_length)
            yield from _time_case(context, engine, shape, case, num_outputs=load.num_outputs)


def _warm_up(context: Context, engine: Engine, shape: Shape, case: Case, *, max_length: int) -> None:
    """Kernels are compiled and graphs captured where first needed: not in what is timed."""
    short = Case(case.batch, min(_SHORT, case.length))
    _run(engine, random_prompts(context, shape, short), min(_WARM_UP, max_length - short.length))


def _time_case(context: Context, engine: Engine, shape: Shape, case: Case, *, num_outputs: int) -> Iterator[Record]:
    prompts = random_prompts(context, shape, case)
    prefills = []
    if case.batch == 1:  # the first prompts of a length still warm up
        _run(engine, [prompt[::-1] for prompt in prompts], 2)
        prefills = [_run(engine, [prompt[i:] + prompt[:i] for prompt in prompts], 2).prefill for i in (1, 2)]
    run = _run(engine, prompts, num_outputs + num_prefill_steps(case))
    floor = prefill_floor(context, shape, case)
    name, num_tokens = f"prefill, {shape.name}, {case}", case.batch * case.length
    yield Timing(name, statistics.median([run.prefill, *prefills]), floor, num_tokens=num_tokens)
    floor = decode_floor(context, shape, case, run.mean_outputs)
    yield Timing(f"decode, {shape.name}, {case}", statistics.median(run.steps), floor, num_tokens=case.batch)


@dataclass(frozen=True)
class _Run:
    """prefill: seconds until each prompt had its first token; steps: of later steps, with the whole batch in each.

    mean_outputs: tokens that an answer had on average while these ran
    """

    prefill: float
    steps: list[float]
    mean_outputs: float


def _run(engine: Engine, prompts: list[list[int]], num_outputs: int) -> _Run:
    for number, prompt in enumerate(prompts):
        params = SamplingParams(seed=number, max_tokens=num_outputs, temperature=0.0)
        engine.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params))
    num_tokens = dict.fromkeys(map(str, range(len(prompts))), 0)
    start = time.perf_counter()
    while min(num_tokens.values()) < 1:
        _step(engine, num_tokens)
    prefill = time.perf_counter() - start
    steps, outputs = [], []
    while max(num_tokens.values()) < num_outputs:
        start = time.perf_counter()
        _step(engine, num_tokens)
        steps.append(time.perf_counter() - start)
        outputs.append(statistics.mean(num_tokens.values()))
    while engine.has_work:
        _step(engine, num_tokens)
    assert steps, "the first answer was over before the last one had begun"
    first = len(steps) // 4  # the first ones still warm up
    return _Run(prefill, steps[first:], statistics.mean(outputs[first:]))


def _step(engine: Engine, num_tokens: dict[str, int]) -> None:
    for output in engine.step()[0]:
        if output.error is not None:
            raise RuntimeError(output.error)
        num_tokens[output.request_id] += len(output.token_ids)
