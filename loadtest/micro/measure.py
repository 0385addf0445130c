"""Timing, tables and result files of the microbenchmarks."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tabulate import tabulate

from engine.planning.machine import read_machine

RESULTS = Path(__file__).parent.parent / "results"
Row = dict[str, str | int | float]


def fastest(work: Callable[[int], object], *, num_calls: int, num_rounds: int = 7) -> float:
    """Seconds per call: the best round of calls work(0) to work(num_calls - 1), as others may be using the machine.

    The argument picks one of several operands, so that together they are more than the caches hold: in a model, a
    weight comes back a whole step later.
    """
    best = float("inf")
    for _ in range(num_rounds + 1):  # the first warms up, and counts only if it was the best
        start = time.perf_counter()
        for index in range(num_calls):
            work(index)
        best = min(best, (time.perf_counter() - start) / num_calls)
    return best


def print_table(rows: list[Row]) -> None:
    print(tabulate(rows, headers="keys", floatfmt=",.1f", intfmt=",", tablefmt="plain"))


def save(name: str, rows: list[Row]) -> Path:
    """Writes the rows beside the facts of this machine, and what else it did, to loadtest/results/micro-{name}.json."""
    machine = {key: value for key, value in asdict(read_machine()).items() if key != "available_bytes"}
    record = {"torch": torch.__version__, "machine": machine, "load_average": list(os.getloadavg()), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"micro-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def parse_numbers(text: str) -> list[int]:
    """`1,2,4`, for an option."""
    return [int(part) for part in text.split(",")]


def parse_arguments(description: str) -> argparse.Namespace:
    """The flags that every benchmark has; sets the number of threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write the rows to loadtest/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def report(name: str, rows: list[Row], arguments: argparse.Namespace) -> None:
    print_table(rows)
    if arguments.save:
        print(f"\n{save(f'{name}-{arguments.threads}t', rows)}")
