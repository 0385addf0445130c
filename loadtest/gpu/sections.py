"""The sections of a run, in the order in which they are run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from loadtest.gpu.context import Context, Job


@dataclass(frozen=True)
class Section:
    """parts: "module:function" of what makes its jobs.

    share: of the time, relative to the others; what one does not use is left for those after it
    num_workers: processes at once, where nothing is timed
    is_fresh: a process for each job, so that it finds all of the device's memory free
    patience: seconds without a record after which the running job is given up
    """

    parts: tuple[str, ...]
    share: float
    num_workers: int = 1
    is_fresh: bool = False
    patience: float = 60.0


def jobs_of(section: Section, context: Context) -> list[Job]:
    found: list[Job] = []
    for part in section.parts:
        module, _, function = part.partition(":")
        found += getattr(importlib.import_module(module), function)(context)
    return found


def _parts(function: str, *modules: str) -> tuple[str, ...]:
    return tuple(f"loadtest.gpu.{module}:{function}" for module in modules)


SECTIONS = {
    "machine": Section(_parts("jobs", "machine"), share=0.4),
    "checks": Section(
        _parts("checks", "attention", "elementwise", "moe", "sampling", "quantized"), share=1.8, num_workers=12
    ),
    "compile": Section(_parts("compilations", "tune"), share=1.0, num_workers=12),
    "tune": Section(_parts("jobs", "tune"), share=1.0),
    "kernels": Section(
        _parts("timings", "attention", "elementwise", "sampling", "moe", "linear", "quantized"), share=2.0
    ),
    "engine": Section(_parts("jobs", "engine_times"), share=2.2, is_fresh=True, patience=120.0),
    "http": Section(_parts("jobs", "http_times"), share=1.4, is_fresh=True, patience=120.0),
}
