"""The time between tokens as a client of the whole server sees it: engine, the way between the processes, and HTTP."""

from __future__ import annotations

import argparse
import shlex
import socket
import sys

from loadtest.arrivals import ClosedLoop
from loadtest.cli import run_in_loop
from loadtest.client import Target
from loadtest.hosting import Launch, LaunchingHost
from loadtest.lengths import FixedLength
from loadtest.measure import Case, Peer, measure
from loadtest.micro.steady import LOWEST_ID
from loadtest.progress import Progress
from loadtest.runner import Plan
from loadtest.workload import Exchange, Workload

HIGHEST_ID = 255  # prompts of ids that every vocabulary has
PATIENCE = 300.0  # seconds until the server's first answer


def served_token_seconds(options: argparse.Namespace, batches: list[int], *, context: int) -> dict[int, float]:
    """Median seconds between two tokens of a stream, by the number of streams that run at once.

    Starts a server with the engine that `options` describes (see `add_engine_options`), and ends it. All streams of a
    batch begin together, and are half through when their context is about `context` tokens.
    """
    return run_in_loop(_measure(options, batches, context))


async def _measure(options: argparse.Namespace, batches: list[int], context: int) -> dict[int, float]:
    port = _free_port()
    peer = Peer("server", Target(f"http://127.0.0.1:{port}"))
    launch = Launch(_command(options, port, max(batches)), Exchange([LOWEST_ID] * 4, 1), PATIENCE)
    host = LaunchingHost(peer, launch, seed=0)
    num_prompt = max(context // 8, 1)  # few, and many outputs: all streams run beside one another for most of the time
    num_outputs = max(2 * (context - num_prompt), 2)
    workload = Workload(FixedLength(num_prompt), FixedLength(num_outputs), 0, token_ids=(LOWEST_ID, HIGHEST_ID))
    seconds: dict[int, float] = {}
    try:
        await host.begin()
        for number, batch in enumerate(batches):
            case = Case(f"{batch} streams", workload, Plan(ClosedLoop(batch), batch, None, batch))
            result = await measure(host.ready, case, round=number, service_level=None, progress=Progress())
            gaps = result.figures.inter_token_latency
            if result.figures.num_failures or gaps is None:
                raise RuntimeError(f"{batch} streams: {result.figures.errors}: {result.failure_examples}")
            seconds[batch] = gaps.p50 or gaps.mean  # where most tokens come several at a time the median is zero
    finally:
        await host.end()
    return seconds


def _command(options: argparse.Namespace, port: int, num_seqs: int) -> str:
    settings = {
        "model.load_format": options.load_format,
        "model.quantization": options.quantization,
        "device.kernels": options.kernels,
        "device.num_threads": options.threads,
        "scheduler.max_num_seqs": num_seqs,
    }
    arguments = [sys.executable, "-m", "server.cli", "serve", options.model, "--port", str(port)]
    for name, value in settings.items():
        arguments += ["--set", f"{name}={value}"]
    return f"exec {shlex.join(arguments)}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
