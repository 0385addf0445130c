"""The same as `engine_times`, as a client sees it: a server process, HTTP, and the load generator."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from loadtest.client.client import Target, run_in_loop
from loadtest.compare.measure import Case as LoadCase
from loadtest.compare.measure import Peer, ReadyPeer, measure, prepare
from loadtest.compare.progress import Progress
from loadtest.compare.runner import Plan
from loadtest.gpu.context import Context, Job
from loadtest.gpu.end_to_end import Case, allow, cases_of, decode_floor
from loadtest.gpu.records import Problem, Record, Timing
from loadtest.gpu.shapes import Load, load_of
from loadtest.micro.own_server import own_server
from loadtest.micro.shapes import Shape
from loadtest.workload.arrivals import ClosedLoop
from loadtest.workload.lengths import FixedLength
from loadtest.workload.prompts import Workload

_NUM_ROUNDS = 2  # times that each stream has a request


def jobs(context: Context) -> list[Job]:
    load = load_of(is_rehearsal=context.is_rehearsal)
    return [
        Job(f"{shape.name} over HTTP", partial(_time, context, shape, load, num_jobs_left=len(load.shapes) - number))
        for number, shape in enumerate(load.shapes)
    ]


def _time(context: Context, shape: Shape, load: Load, *, num_jobs_left: int) -> Iterator[Record]:
    allowance = allow(context, num_jobs_left=num_jobs_left, overhead=5.0)
    settings = {"model.load_format": "dummy", "scheduler.max_num_seqs": max(load.batches)}
    if context.is_rehearsal:
        settings |= {"device.name": "cpu", "device.num_threads": 1, "device.kernels": "torch"}
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    started = time.perf_counter()
    with (
        shape.folder(max_length=load.max_length) as folder,
        own_server([str(folder), *options], patience=context.seconds_left) as url,
    ):
        yield Timing(f"start over HTTP, {shape.name}", time.perf_counter() - started)
        ready = run_in_loop(prepare(Peer(shape.name, Target(url)), seed=context.seed))
        for case in cases_of(load):
            if allowance.has_room_for(shape, case, _NUM_ROUNDS * load.num_outputs):
                yield from _time_case(context, shape, case, ready, num_outputs=load.num_outputs)
            else:
                yield Problem(f"{shape.name}, {case}, over HTTP", "left out for want of time")


def _time_case(context: Context, shape: Shape, case: Case, ready: ReadyPeer, *, num_outputs: int) -> Iterator[Record]:
    title = f"{shape.name}, {case}, over HTTP"
    lengths, ids = (FixedLength(case.length), FixedLength(num_outputs)), (1, shape.vocab_size - 1)
    plan = Plan(ClosedLoop(case.batch), _NUM_ROUNDS * case.batch, None, num_warmup_requests=min(2, case.batch))
    load = LoadCase(title, Workload(*lengths, context.seed, token_ids=ids), plan)
    try:
        result, _ = run_in_loop(measure(ready, load, round=case.batch, service_level=None, progress=Progress()))
    except (RuntimeError, ValueError) as error:
        yield Problem(title, str(error))
        return
    figures = result.figures
    if figures.num_failures:
        yield Problem(title, f"{figures.errors}: {result.failure_examples}")
    note = f"{figures.output_tokens_per_second:,.0f} tokens/s with prefill"
    if figures.time_per_output_token is not None:
        floor = decode_floor(context, shape, case, num_outputs / 2)
        seconds = figures.time_per_output_token.p50
        yield Timing(f"time per token, {title}", seconds, floor, num_tokens=case.batch, note=note)
    if figures.time_to_first_token is not None:
        yield Timing(f"time to first token, {title}", figures.time_to_first_token.p50)
