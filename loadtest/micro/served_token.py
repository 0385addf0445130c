"""The time between tokens as a client of the whole server sees it: engine, the way between the processes, and HTTP."""

from __future__ import annotations

import argparse

from loadtest.client.client import Target, run_in_loop
from loadtest.compare.measure import Case, Peer, measure, prepare
from loadtest.compare.progress import Progress
from loadtest.compare.runner import Plan
from loadtest.micro.own_server import HIGHEST_ID, LOWEST_ID, own_server
from loadtest.workload.arrivals import ClosedLoop
from loadtest.workload.lengths import FixedLength
from loadtest.workload.prompts import Workload


def served_token_seconds(options: argparse.Namespace, batches: list[int], *, context: int) -> dict[int, float]:
    """Median seconds between two tokens of a stream, by the number of streams that run at once.

    Starts a server with the engine that `options` describes (see `add_engine_options`), and ends it. All streams of a
    batch begin together, and are half through when their context is about `context` tokens.
    """
    settings = {
        "model.load_format": options.load_format,
        "model.quantization": options.quantization,
        "device.kernels": options.kernels,
        "device.num_threads": options.threads,
        "scheduler.max_num_seqs": max(batches),
    }
    arguments = [options.model, *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))]
    with own_server(arguments) as url:
        return run_in_loop(_measure(url, batches, context))


async def _measure(url: str, batches: list[int], context: int) -> dict[int, float]:
    ready = await prepare(Peer("server", Target(url)), seed=0)
    num_prompt = max(context // 8, 1)  # few, and many outputs: all streams run beside one another for most of the time
    num_outputs = max(2 * (context - num_prompt), 2)
    workload = Workload(FixedLength(num_prompt), FixedLength(num_outputs), 0, token_ids=(LOWEST_ID, HIGHEST_ID))
    seconds: dict[int, float] = {}
    for number, batch in enumerate(batches):
        case = Case(f"{batch} streams", workload, Plan(ClosedLoop(batch), batch, None, batch))
        result, _ = await measure(ready, case, round=number, service_level=None, progress=Progress())
        gaps = result.figures.inter_token_latency
        if result.figures.num_failures or gaps is None:
            raise RuntimeError(f"{batch} streams: {result.figures.errors}: {result.failure_examples}")
        seconds[batch] = gaps.p50 or gaps.mean  # where most tokens come several at a time the median is zero
    return seconds
