"""Runs the sections one after the other, each in processes of its own, and none for longer than its time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from loadtest.gpu import records
from loadtest.gpu.context import Context, read_context
from loadtest.gpu.records import Begun, Ceilings, Problem, Record, SectionResult
from loadtest.gpu.sections import SECTIONS, Section
from loadtest.gpu.worker import MORE

ROOT = Path(__file__).resolve().parents[2]
_POLL = 0.05  # seconds
_PAUSE = 0.5  # seconds between two looks at what a section has found so far

Keep = Callable[[SectionResult], None]


@dataclass(frozen=True)
class Settings:
    """minutes: for everything; tables: the folder of the tile shapes"""

    sections: list[str]
    minutes: float
    is_rehearsal: bool
    seed: int
    tables: Path


def run_sections(settings: Settings, keep: Keep, done: Keep) -> None:
    """Nothing that a section does ends the run.

    keep: gets what a running section has found so far, again and again; done: gets all of it, as soon as it is over
    """
    end = time.monotonic() + 60 * settings.minutes
    ceilings: Ceilings | None = None
    for number, name in enumerate(settings.sections):
        left = sum(SECTIONS[later].share for later in settings.sections[number:])
        seconds = (end - time.monotonic()) * SECTIONS[name].share / left
        result = partial(_result, name, time.monotonic())
        found = run_section(
            SECTIONS[name],
            settings,
            seconds=seconds,
            ceilings=ceilings,
            tell=lambda found, result=result: keep(result(found)),
        )
        ceilings = next((record for record in found if isinstance(record, Ceilings)), ceilings)
        done(result(found))


def _result(name: str, start: float, found: list[Record]) -> SectionResult:
    return SectionResult(name, round(time.monotonic() - start, 1), found)


def run_section(
    section: Section,
    settings: Settings,
    *,
    seconds: float,
    ceilings: Ceilings | None,
    tell: Callable[[list[Record]], None] = lambda found: None,
) -> list[Record]:
    """What its jobs found in at most so many seconds, and what went wrong with those that found nothing.

    tell: gets what there is so far, when something has come
    """
    end = time.monotonic() + seconds
    context = Context(
        is_rehearsal=settings.is_rehearsal,
        seed=settings.seed,
        deadline=time.time() + seconds,
        ceilings=ceilings,
        tables=str(settings.tables),
    )
    num_workers = 1 if settings.is_rehearsal else section.num_workers
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "context.json"
        path.write_bytes(msgspec.json.encode(context))
        workers = [_Worker(section, path, part, num_workers) for part in range(num_workers)]
        try:
            _watch(workers, end, tell)
        finally:
            for worker in workers:
                worker.stop()
        return _found(workers)


def _watch(workers: list[_Worker], end: float, tell: Callable[[list[Record]], None]) -> None:
    at_work, told_at, num_told = workers, 0.0, 0
    while at_work and time.monotonic() < end:
        time.sleep(_POLL)
        at_work = [worker for worker in at_work if worker.is_at_work()]
        if time.monotonic() > told_at + _PAUSE:
            found, told_at = _found(workers), time.monotonic()
            if len(found) > num_told:
                tell(found)
                num_told = len(found)


def _found(workers: list[_Worker]) -> list[Record]:
    return [record for worker in workers for record in worker.found()]


class _Worker:
    """A share of a section's jobs. Where a process dies, or is stuck in a job, a new one goes on after that job."""

    def __init__(self, section: Section, context: Path, part: int, num_parts: int) -> None:
        self._section = section
        self._output = context.parent / f"{part}.jsonl"
        self._log = context.parent / f"{part}.log"
        is_rehearsal = read_context(context).is_rehearsal
        is_fresh = section.is_fresh and not is_rehearsal  # without a device there is none of its memory to free
        self._command = [sys.executable, "-m", "loadtest.gpu.worker", section.module, "fresh" if is_fresh else "shared"]
        self._command += [str(context), str(self._output), str(part), str(num_parts)]
        self._environment = worker_environment(is_rehearsal=is_rehearsal, num_workers=num_parts)
        self._num_done = 0
        self._is_over = False
        self._heard_at = time.monotonic()
        self._num_records = 0
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [*self._command, str(self._num_done)],
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it is ended with all that it started
            )

    def is_at_work(self) -> bool:
        if self._is_over:
            return False
        code = self._process.poll()
        if code is None:
            return self._is_heard()
        self._go_on("" if code == MORE else f"its process ended with {code}: {self._last_words()}", code)
        return not self._is_over

    def _is_heard(self) -> bool:
        num_records = len(records.read(self._output))
        if num_records > self._num_records:
            self._num_records, self._heard_at = num_records, time.monotonic()
        if time.monotonic() - self._heard_at > self._section.patience:
            _end(self._process)
            self._go_on(f"nothing was heard of it for {self._section.patience:.0f} s", -1)
        return not self._is_over

    def _go_on(self, complaint: str, code: int) -> None:
        """After the last job that had begun; if none had, a new process would fare no better."""
        jobs = [record.job for record in records.read(self._output) if isinstance(record, Begun)]
        self._is_over = code == 0 or len(jobs) == self._num_done
        if code != 0 and complaint and not self._is_explained():
            records.append(self._output, Problem(jobs[-1] if jobs else "start", complaint))
        if not self._is_over:
            self._num_done, self._heard_at = len(jobs), time.monotonic()
            self._process = self._start()

    def _is_explained(self) -> bool:
        found = records.read(self._output)
        return bool(found) and isinstance(found[-1], Problem)

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"

    def stop(self) -> None:
        """The deadline has come, or all is done."""
        if self._process.poll() is None:
            _end(self._process)
            jobs = [record.job for record in records.read(self._output) if isinstance(record, Begun)]
            records.append(self._output, Problem(jobs[-1] if jobs else "start", "stopped: the section's time was over"))

    def found(self) -> list[Record]:
        return [record for record in records.read(self._output) if not isinstance(record, Begun)]


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, 9)
    process.wait()


def worker_environment(*, is_rehearsal: bool, num_workers: int) -> dict[str, str]:
    """Fused multiply-adds are what the kernels were compiled and checked with. Processes at once share the cores."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if is_rehearsal:
        return environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if num_workers > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_workers))
    return environment
