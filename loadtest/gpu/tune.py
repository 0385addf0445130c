"""Finds the fastest tile shapes for this chip and writes its table, which the engine reads when it starts.

What it will try is compiled before, in many processes at once; their results lie in Triton's cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import triton

from kernels.triton.configs import chip_of
from loadtest.gpu.candidates import IMPOSSIBLE, Config, Load, Tunable, tunables
from loadtest.gpu.context import Context, Job
from loadtest.gpu.records import Problem, Record, Tuned
from loadtest.gpu.stopwatch import Stopwatch

_GAIN = 0.98  # a smaller gain is noise
_NUM_FINALISTS = 4
_RESERVE = 0.25  # of the time of a tunable, for the finalists


def compilations(context: Context) -> list[Job]:
    return [
        Job(f"{tunable.name}: {number}", partial(_compile, tunable, config))
        for tunable in tunables(context)
        for number, config in enumerate(tunable.configs())
    ]


def _compile(tunable: Tunable[Config], config: Config) -> Iterator[Record]:
    with suppress(*IMPOSSIBLE):  # the tuner will not take these either
        tunable.loads()[0].run(config)(0)
    yield from ()


def jobs(context: Context) -> list[Job]:
    found = list(tunables(context))
    return [
        Job(tunable.name, partial(tune, context, tunable, share=1 / (len(found) - number)))
        for number, tunable in enumerate(found)
    ]


def tune(context: Context, tunable: Tunable[Config], *, share: float) -> Iterator[Record]:
    """Writes the fastest config that is right. share: of the time that is left"""
    seconds_left = context.seconds_left
    stop_at = seconds_left * (1 - share * (1 - _RESERVE))
    loads = tunable.loads()
    watch = Stopwatch(context.device, num_rounds=3)
    scores: dict[Config, float] = {}
    for config in tunable.configs():
        if scores and context.seconds_left < stop_at:
            break
        try:
            scores[config] = _mean([watch.time(load.run(config), num_sets=load.num_sets) for load in loads])
        except IMPOSSIBLE:
            continue
    ranking, before = _rank(context, tunable, loads, sorted(scores, key=scores.__getitem__)[:_NUM_FINALISTS])
    for best, after in ranking:
        complaint = _complaint(tunable, best)
        if complaint:
            yield Problem(tunable.name, f"{complaint}, and was not written: {best}")
            continue
        fields = asdict(best)
        for key in tunable.keys:
            path = write_entry(context, tunable, key, {name: fields[name] for name in tunable.axes})
            yield Tuned(tunable.kernel, key, fields, before, after, len(scores), path.name)
        break
    if len(scores) < len(tunable.configs()):
        yield Problem(tunable.name, f"tried {len(scores)} of {len(tunable.configs())} configs")


def _rank(
    context: Context, tunable: Tunable[Config], loads: list[Load[Config]], finalists: list[Config]
) -> tuple[list[tuple[Config, float]], float]:
    """The finalists and the base, timed in turns: the fastest first, down to the base; and the base's time."""
    contestants = list(dict.fromkeys([tunable.base, *finalists]))
    seconds: list[dict[str, float]] = []
    for load in loads:
        works = {str(number): load.run(config) for number, config in enumerate(contestants)}
        seconds.append(Stopwatch(context.device).compare(works, num_sets=load.num_sets))
    means = [_mean([case[str(number)] for case in seconds]) for number in range(len(contestants))]
    faster = [number for number in range(1, len(means)) if means[number] <= _GAIN * means[0]]
    order = [*sorted(faster, key=means.__getitem__), 0]
    return [(contestants[number], means[number]) for number in order], means[0]


def _complaint(tunable: Tunable[Config], config: Config) -> str:
    """The reason why a config may not be used though it was fast; empty if there is none."""
    try:
        error = tunable.check(config)
    except IMPOSSIBLE as failure:  # it fits the cases that were timed, but not all that it would be used for
        return f"a fast config is impossible elsewhere ({type(failure).__name__})"
    return "" if error <= tunable.bound else f"a fast config is wrong by {error:.2g}"


def _mean(values: list[float]) -> float:
    """The geometric mean: a case counts by its relative change, not by its duration."""
    return math.exp(sum(math.log(max(value, 1e-9)) for value in values) / len(values))


def write_entry(context: Context, tunable: Tunable[Config], key: str, values: dict[str, int]) -> Path:
    """Puts fields into the table of this chip, beside what is there. Entries are complete: only one is looked up."""
    path = Path(context.tables) / f"{chip_of(context.device)}.json"
    tables: dict[str, dict[str, dict[str, int]]] = json.loads(path.read_text())["kernels"] if path.exists() else {}
    entry = tables.setdefault(tunable.kernel, {}).setdefault(key, asdict(tunable.base))
    entry.update(values)
    date = datetime.now(UTC).date().isoformat()
    chip = torch.cuda.get_device_name() if context.device.type == "cuda" else "a rehearsal"
    provenance = f"measured on {chip}, {date}, torch {torch.__version__}, triton {triton.__version__}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_as_text(provenance, tables))
    return path


def _as_text(provenance: str, tables: dict[str, dict[str, dict[str, int]]]) -> str:
    """One line per entry."""
    kernels = []
    for kernel, entries in tables.items():
        lines = [f"      {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items()]
        kernels.append(f"    {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n    }")
    joined = ",\n".join(kernels)
    return f'{{\n  "provenance": {json.dumps(provenance)},\n  "kernels": {{\n{joined}\n  }}\n}}\n'
