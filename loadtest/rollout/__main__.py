"""`python -m loadtest.rollout`: replicas behind HAProxy and nginx, restarted and killed under load."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.report.environment import Environment, read_environment
from loadtest.report.result_files import dated_path, save_result
from loadtest.rollout.balancers import BALANCERS
from loadtest.rollout.scenario import BalancerRun, Options, run

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
SETTINGS = "--set device.num_threads=1 --set kv_cache.memory=40000tokens"


@dataclass(frozen=True)
class RolloutResult:
    """A result file: kind tells it from others."""

    kind: str
    command: str
    environment: Environment
    options: Options
    runs: list[BalancerRun]


def main(arguments: list[str] | None = None) -> int:
    """0: a rolling restart lost nothing, and a kill only answers that had begun; 1: they did; 2: it did not run."""
    parsed = _parser().parse_args(arguments)
    options = Options(
        command=shlex.split(parsed.command or _own_command(parsed.model)),
        model=parsed.model,
        num_replicas=parsed.replicas,
        num_requests=parsed.requests,
        num_clients=parsed.clients,
        max_tokens=parsed.max_tokens,
        settle=parsed.settle,
    )
    environment, runs = read_environment(), []
    with tempfile.TemporaryDirectory(prefix="peregrine-rollout-") as folder:
        for name in parsed.balancer:
            print(f"{name}: {options.num_replicas} replicas of {options.model}", file=sys.stderr)
            (place := Path(folder) / name).mkdir()
            try:
                done = asyncio.run(run(name, options, place))
            except (RuntimeError, ValueError, OSError) as error:
                print(f"rollout: {error}", file=sys.stderr)
                return 2
            runs.append(done)
            print(_line(done))
    command = shlex.join(["python", "-m", "loadtest.rollout", *(sys.argv[1:] if arguments is None else arguments)])
    if parsed.results is not None:
        path = dated_path(parsed.results, "rollout", environment)
        kept = replace(options, command=[word.removeprefix(f"{ROOT}/") for word in options.command])
        save_result(RolloutResult("rollout", command, environment, kept, runs), path)
        print(f"written: {path}")
    return 0 if all(done.is_good for done in runs) else 1


def _own_command(model: str) -> str:
    options = f"--config {ROOT}/configs/production.yaml --served-model-name {model}"
    return f"{sys.executable} -m server.cli serve {model} {options} {SETTINGS}"


def _line(done: BalancerRun) -> str:
    rolling, kill = done.rolling_restart, done.kill
    return (
        f"{done.balancer}: rolling restart: {rolling.num_lost} of {rolling.num_sent} requests lost; "
        f"kill: {kill.num_lost} of {kill.num_sent} lost, {kill.num_lost_before_begin} of them before their answer began"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.rollout", description=__doc__)
    parser.add_argument("--balancer", nargs="+", choices=sorted(BALANCERS), default=sorted(BALANCERS))
    parser.add_argument("--model", default=MODEL, help=f"({MODEL})")
    parser.add_argument("--command", help="starts a replica; --host and --port are added (our own server)")
    parser.add_argument("--replicas", type=int, default=3, help="(3)")
    parser.add_argument("--requests", type=int, default=2000, help="of a rolling restart, at least (2000)")
    parser.add_argument("--clients", type=int, default=24, help="that send at once (24)")
    parser.add_argument("--max-tokens", type=int, default=16, help="of an answer (16)")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds from one restart to the next (3)")
    parser.add_argument("--results", type=Path, help="folder for a result file, as loadtest/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
