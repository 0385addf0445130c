"""Whether this load generator and NVIDIA's AIPerf measure the same: `python -m loadtest.agreement TRACE --aiperf PATH`.

Both replay a trace against one server, in turns and each first half of the time, with texts that this one writes and
AIPerf is given word by word. No text comes twice, so that no cache of prefixes helps the second. What both call by one
name is compared: the time to the first token, the time per token after it (AIPerf's inter-token latency is a mean of
each answer's), and output tokens per second.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec
from tabulate import tabulate

from loadtest.client.client import Api, Target, run_in_loop
from loadtest.compare.measure import Case, Peer, ReadyPeer, measure, prepare
from loadtest.compare.progress import Progress
from loadtest.compare.runner import Plan
from loadtest.report.environment import Environment, read_environment
from loadtest.report.result_files import save_result
from loadtest.scenarios.trace_file import read_trace
from loadtest.scenarios.traced import TraceWorkload, arrivals_of, with_lengths

TOLERANCE = 0.05


@dataclass(frozen=True)
class Reading:
    """What one tool says of one run. Seconds, and output tokens per second"""

    tool: str
    pair: int
    num_answers: int
    time_to_first_token: float
    time_per_output_token: float
    output_tokens_per_second: float


FIGURES = ("time_to_first_token", "time_per_output_token", "output_tokens_per_second")


@dataclass(frozen=True)
class Agreement:
    """ratios: AIPerf's figure over ours, the median of the pairs; versions: of both, and of the server"""

    command: list[str]
    environment: Environment
    aiperf: str
    server: str
    trace: str
    num_requests: int
    readings: list[Reading]
    ratios: dict[str, float]

    @property
    def is_good(self) -> bool:
        return all(abs(ratio - 1) <= TOLERANCE for ratio in self.ratios.values())


def ratios_of(readings: Sequence[Reading]) -> dict[str, float]:
    """Of each figure, the median over the pairs that have both."""
    ours, theirs = ({each.pair: each for each in readings if each.tool == tool} for tool in ("loadtest", "aiperf"))
    pairs = sorted(ours.keys() & theirs.keys())
    return {name: median(getattr(theirs[pair], name) / getattr(ours[pair], name) for pair in pairs) for name in FIGURES}


async def read_ours(ready: ReadyPeer, workload: TraceWorkload, plan: Plan, *, stream: int, pair: int) -> Reading:
    """RuntimeError where a request failed: then there is nothing to compare."""
    case = Case(workload.name, workload, plan)
    progress = Progress(case.name, len(workload.requests), is_shown=True)
    measurement, _ = await measure(ready, case, round=stream, service_level=None, progress=progress)
    progress.close()
    figures = measurement.figures
    first, each = figures.time_to_first_token, figures.time_per_output_token
    if figures.num_failures or first is None or each is None:
        raise RuntimeError(f"{figures.num_failures} requests failed here: {measurement.failure_examples}")
    return Reading("loadtest", pair, figures.num_answers, first.mean, each.mean, figures.output_tokens_per_second)


class _Statistic(msgspec.Struct):
    avg: float


class _Exported(msgspec.Struct):
    """The fields of AIPerf's profile_export_aiperf.json that are compared. Milliseconds"""

    request_count: _Statistic
    time_to_first_token: _Statistic
    inter_token_latency: _Statistic
    output_token_throughput: _Statistic


def read_theirs(
    aiperf: str, ready: ReadyPeer, workload: TraceWorkload, *, tokenizer: str, speed: float, pair: int
) -> Reading:
    """Runs AIPerf on the requests of a workload. RuntimeError with what it printed last where that fails."""
    target = ready.peer.target
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        with trace.open("wb") as file:
            for index, request in enumerate(workload.requests):
                exchange = workload.exchange(index)
                line = {
                    "timestamp": round(1000 * request.at / speed),
                    "text_input": exchange.prompt,
                    "output_length": exchange.num_output_tokens,
                }
                file.write(msgspec.json.encode(line) + b"\n")
        command = [
            aiperf, "profile", "--model", str(target.model), "--url", target.base_url,
            "--endpoint-type", "completions", "--streaming", "--input-file", str(trace),
            "--custom-dataset-type", "mooncake_trace", "--fixed-schedule", "--tokenizer", tokenizer,
            "--use-server-token-count", "--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0",
            "--output-artifact-dir", folder, "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics",
            "--workers-max", "2", "--record-processors", "1",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        found = sorted(Path(folder).rglob("profile_export_aiperf.json"))
        if done.returncode or not found:
            raise RuntimeError(f"aiperf ended with status {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
        figures = msgspec.json.decode(found[0].read_bytes(), type=_Exported)
    return Reading(
        "aiperf",
        pair,
        round(figures.request_count.avg),
        figures.time_to_first_token.avg / 1000,
        figures.inter_token_latency.avg / 1000,
        figures.output_token_throughput.avg,
    )


async def compare(options: argparse.Namespace) -> Agreement:
    trace = read_trace(Path(options.trace)).cut(start=0.0, seconds=None, limit=options.requests)
    trace = with_lengths(
        trace, scale=1.0, max_prompt_tokens=options.max_prompt_tokens, max_output_tokens=options.max_output_tokens
    )
    target = Target(options.url, model=options.model, api=Api.COMPLETIONS)
    ready = await prepare(Peer("server", target, sends_text=True), seed=options.seed)
    workload = TraceWorkload(trace.requests, trace.name, options.seed, text=ready.text)
    plan = Plan(arrivals_of(trace, speed=options.speed), None, None, 0)
    readings: list[Reading] = []
    for pair in range(options.pairs):
        for turn in range(2):
            stream = 1 + 2 * pair + turn
            if (pair + turn) % 2:
                of_stream = workload.of_stream(stream, ready.text)
                reading = read_theirs(
                    options.aiperf, ready, of_stream, tokenizer=options.tokenizer, speed=options.speed, pair=pair
                )
            else:
                reading = await read_ours(ready, workload, plan, stream=stream, pair=pair)
            readings.append(reading)
            print(reading, file=sys.stderr, flush=True)
    return Agreement(
        command=options.command,
        environment=read_environment(),
        aiperf=_version(options.aiperf),
        server=f"{ready.server.model} {ready.server.version}",
        trace=trace.name,
        num_requests=len(trace.requests),
        readings=readings,
        ratios=ratios_of(readings),
    )


def _version(aiperf: str) -> str:
    return subprocess.run([aiperf, "--version"], capture_output=True, text=True, timeout=120).stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    """0: both agree; 1: they do not; 2: that could not be found out"""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m loadtest.agreement", description=__doc__)
    parser.add_argument("trace", help="as of replay")
    parser.add_argument("--aiperf", required=True, help="the program, in an environment of its own")
    parser.add_argument("--tokenizer", required=True, help="folder of the served model's tokenizer, for AIPerf")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, help="of the trace, at most")
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--max-prompt-tokens", type=int)
    parser.add_argument("--max-output-tokens", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    options.command = ["python", "-m", "loadtest.agreement", *arguments]
    try:
        agreement = run_in_loop(compare(options))
    except (ValueError, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        print(f"loadtest.agreement: {error}", file=sys.stderr)
        return 2
    rows = [
        [each.pair, each.tool, each.num_answers, *(f"{getattr(each, name):.4f}" for name in FIGURES)]
        for each in agreement.readings
    ]
    print(tabulate(rows, ["pair", "tool", "answers", *FIGURES], disable_numparse=True))
    print("AIPerf's over ours:", ", ".join(f"{name} {ratio:.3f}" for name, ratio in agreement.ratios.items()))
    if options.json is not None:
        save_result(agreement, options.json)
    return 0 if agreement.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
