"""The sections of a run, in the order in which they are run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """module: has `jobs(context)`.

    share: of the time, relative to the others; what one does not use is left for those after it
    num_workers: processes at once, where nothing is timed
    is_fresh: a process for each job, so that it finds all of the device's memory free
    patience: seconds without a record after which the running job is given up
    """

    module: str
    share: float
    num_workers: int = 1
    is_fresh: bool = False
    patience: float = 60.0


SECTIONS = {
    "machine": Section("loadtest.gpu.machine", share=0.4),
    "checks": Section("loadtest.gpu.checks", share=1.5, num_workers=12),
    "compile": Section("loadtest.gpu.compile", share=1.0, num_workers=12),
    "tune": Section("loadtest.gpu.tune", share=1.0),
    "kernels": Section("loadtest.gpu.kernel_times", share=1.5),
    "engine": Section("loadtest.gpu.engine_times", share=2.2, is_fresh=True, patience=120.0),
    "http": Section("loadtest.gpu.http_times", share=1.4, is_fresh=True, patience=120.0),
}
