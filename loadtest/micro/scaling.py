"""How does the cost of a step grow? `python -m loadtest.micro.scaling [--threads 2] [--quantization int8]`

Milliseconds of `Engine.step` against the number of running sequences, the length of their contexts, and the number of
waiting requests, with the share of each part. Contexts are real: prompts are computed first, which takes most of the
time, and sets the grid: 64 sequences of 128 tokens, 8 of up to 2,048, one of up to 8,192. With the default model on two
cores three rounds take about ten minutes; run it on a quiet machine. Writes DATE-scaling.json into loadtest/results
and prints the tables for the README; `--table FILE` prints them again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from pathlib import Path

from tabulate import tabulate

from loadtest.micro.measure import parse_numbers
from loadtest.micro.steady import PARTS, State, SteadyEngine, StepTimes, add_engine_options, build_steady
from loadtest.report.environment import Environment, read_environment
from loadtest.report.result_files import dated_path, load_result, save_result

SHORT_CONTEXT = 128
NUM_LONG = 8  # sequences beside the single one in the table over contexts
NUM_LONG_TOKENS = 16_384  # of all their contexts together: what is computed within a minute
SHARES = (*PARTS, "other")


@dataclass(frozen=True)
class Point:
    state: State
    times: StepTimes


@dataclass(frozen=True)
class Scaling:
    """What one run measured. settings: those of the engine, resolved; each point is of the fastest of `num_rounds`"""

    environment: Environment
    settings: dict[str, str | int | float | bool | None]
    num_steps: int
    num_rounds: int
    over_batch: list[Point]
    over_context: list[Point]
    over_waiting: list[Point]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.table is not None:
        print(tables(load(options.table)))
        return 0
    scaling = measure(options)
    path = dated_path(options.results, "scaling", scaling.environment)
    save_result(scaling, path)
    print(tables(scaling), f"\nwritten: {path}", sep="\n")
    return 0


def measure(options: argparse.Namespace) -> Scaling:
    """All three tables. The engine has as many seats as the largest batch, so that others must wait."""
    num_most = max(options.batches)
    over_batch = [State(batch, SHORT_CONTEXT) for batch in options.batches]
    over_context = [State(1, context) for context in options.contexts]
    if num_most >= NUM_LONG:
        over_context += [State(NUM_LONG, n) for n in options.contexts if NUM_LONG * n <= NUM_LONG_TOKENS]
    over_waiting = [State(num_most, SHORT_CONTEXT, waiting) for waiting in options.waiting]
    steady = build_steady(options, over_batch + over_context)
    tables = (over_batch, over_context, over_waiting)
    rounds = [[_points(steady, states, options.steps) for states in tables] for _ in range(options.rounds)]
    points = [[min(tries, key=_seconds) for tries in zip(*table, strict=True)] for table in zip(*rounds, strict=True)]
    return Scaling(read_environment(), steady.settings, options.steps, options.rounds, *points)


def _points(steady: SteadyEngine, states: Sequence[State], num_steps: int) -> list[Point]:
    points = []
    for state in states:
        print(f"{state.num_running} running, context {state.context}, {state.num_waiting} waiting", file=sys.stderr)
        points.append(Point(state, steady.measure(state, num_steps=num_steps)))
    return points


def _seconds(point: Point) -> float:
    return point.times.whole


def load(path: Path) -> Scaling:
    """Raises ValueError if the file is of something else."""
    return load_result(path, Scaling, origin="loadtest.micro.scaling")


def tables(scaling: Scaling) -> str:
    """Markdown: three tables, how steeply the time grows, and where it was measured."""
    batch = [([f"{p.state.num_running}"], p) for p in scaling.over_batch]
    context = [([f"{p.state.num_running}", f"{p.state.context:,}"], p) for p in scaling.over_context]
    waiting = [([f"{p.state.num_running}", f"{p.state.num_waiting:,}"], p) for p in scaling.over_waiting]
    return "\n\n".join(
        [
            _table([f"running, context {SHORT_CONTEXT}"], batch),
            _table(["running", "context"], context),
            _table(["running", "waiting"], waiting),
            _remarks(scaling),
        ]
    )


def _table(keys: Sequence[str], rows: Sequence[tuple[list[str], Point]]) -> str:
    cells = [
        [*names, f"{1e3 * point.times.whole:.2f}", *(f"{100 * point.times.share(part):.1f}" for part in SHARES)]
        for names, point in rows
    ]
    headers = [*keys, "ms", *(f"{part}, %" for part in SHARES)]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True, stralign="right")


def _remarks(scaling: Scaling) -> str:
    where, settings = scaling.environment, scaling.settings
    busiest = max(scaling.over_batch, key=lambda point: point.state.num_running)
    scheduler = busiest.times.share("schedule") + busiest.times.share("update")
    steepest = ", ".join(f"{name} {exponent:.2f}" for name, exponent in growth(scaling).items())
    names = ("model.dtype", "model.quantization", "device.num_threads")
    chosen = ", ".join(f"{name} {settings[name]}" for name in names)
    return (
        f"The scheduler's share (schedule, update) with {busiest.state.num_running} running: {100 * scheduler:.1f}%. "
        f"Steepest growth between neighbouring rows, as a power (1 is linear): {steepest}.\n\n"
        f"{where.line}, {chosen}. "
        f"Medians of {scaling.num_steps} steps, in the fastest of {scaling.num_rounds} rounds."
    )


def growth(scaling: Scaling) -> dict[str, float]:
    """For each thing that varies: the largest power of it that the time grew with, between neighbouring points."""
    series = {
        "running": [(p.state.num_running, p) for p in scaling.over_batch],
        "context of one": [(p.state.context, p) for p in scaling.over_context if p.state.num_running == 1],
        f"context of {NUM_LONG}": [(p.state.context, p) for p in scaling.over_context if p.state.num_running != 1],
        "waiting": [(p.state.num_waiting, p) for p in scaling.over_waiting if p.state.num_waiting],
    }
    return {name: max(map(_power, pairwise(points))) for name, points in series.items() if len(points) > 1}


def _power(neighbours: tuple[tuple[int, Point], tuple[int, Point]]) -> float:
    (small, before), (large, after) = neighbours
    return log(after.times.whole / before.times.whole) / log(large / small)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.micro.scaling", description=__doc__)
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of an earlier run")
    parser.add_argument("--batches", type=parse_numbers, default=[1, 2, 4, 8, 16, 32, 64], help="running sequences")
    parser.add_argument("--contexts", type=parse_numbers, default=[128, 512, 2048, 8192], help="tokens of each")
    parser.add_argument("--waiting", type=parse_numbers, default=[0, 100, 1000, 10_000], help="requests that wait")
    parser.add_argument("--steps", type=int, default=20, help="that are timed in each state (20)")
    parser.add_argument("--rounds", type=int, default=3, help="over all states, for machines that others use too (3)")
    add_engine_options(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
