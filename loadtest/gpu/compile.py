"""Compiles what the tuner will try, in many processes at once; their results lie in Triton's cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from loadtest.gpu.candidates import IMPOSSIBLE, Config, Tunable, tunables
from loadtest.gpu.context import Context, Job
from loadtest.gpu.records import Record


def jobs(context: Context) -> list[Job]:
    return [
        Job(f"{tunable.name}: {number}", partial(_compile, tunable, config))
        for tunable in tunables(context)
        for number, config in enumerate(tunable.configs())
    ]


def _compile(tunable: Tunable, config: Config) -> Iterator[Record]:
    with suppress(*IMPOSSIBLE):  # the tuner will not take these either
        tunable.loads()[0].run(config)(0)
    yield from ()
