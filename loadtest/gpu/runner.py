"""Runs the sections one after the other, each in processes of its own, and none for longer than its time."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadtest.compare.processes import send, tree_of
from loadtest.gpu.context import Context
from loadtest.gpu.records import Begun, Ceilings, Problem, Record, SectionResult
from loadtest.gpu.sections import SECTIONS, Section
from loadtest.gpu.worker import MORE, Share, work

_POLL = 0.05  # seconds
_PAUSE = 0.5  # seconds between two looks at what a section has found so far

Keep = Callable[[SectionResult], None]
_decoder = msgspec.json.Decoder(Record)


@dataclass(frozen=True)
class Settings:
    """minutes: for everything; tables: the folder of the tile shapes"""

    sections: list[str]
    minutes: float
    is_rehearsal: bool
    seed: int
    tables: Path


def run_sections(settings: Settings, keep: Keep, done: Keep) -> None:
    """Runs the sections in order; a failure in one does not end the run.

    keep: gets what a running section has found so far, again and again; done: gets all of it, as soon as it is over
    """
    end = time.monotonic() + 60 * settings.minutes
    ceilings: Ceilings | None = None
    for number, name in enumerate(settings.sections):
        left = sum(SECTIONS[later].share for later in settings.sections[number:])
        begun_at = time.monotonic()

        def result(found: list[Record], name: str = name, begun_at: float = begun_at) -> SectionResult:
            return SectionResult(name, round(time.monotonic() - begun_at, 1), found)

        def tell(found: list[Record], result: Callable[[list[Record]], SectionResult] = result) -> None:
            keep(result(found))

        seconds = (end - begun_at) * SECTIONS[name].share / left
        found = run_section(SECTIONS[name], settings, seconds=seconds, ceilings=ceilings, tell=tell)
        ceilings = next((record for record in found if isinstance(record, Ceilings)), ceilings)
        done(result(found))


def run_section(
    section: Section,
    settings: Settings,
    *,
    seconds: float,
    ceilings: Ceilings | None,
    tell: Callable[[list[Record]], None] = lambda found: None,
) -> list[Record]:
    """Runs a section for at most so many seconds. Returns the records of its jobs, and a problem for each without any.

    tell: gets what there is so far, when something has come
    """
    end = time.monotonic() + seconds
    context = Context(settings.is_rehearsal, settings.seed, time.time() + seconds, ceilings, str(settings.tables))
    num_workers = 1 if settings.is_rehearsal else section.num_workers
    with tempfile.TemporaryDirectory() as folder:
        workers = [_Worker(section, context, Share(part, num_workers), Path(folder)) for part in range(num_workers)]
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
        found = _found(workers)
        if len(found) > num_told and time.monotonic() > told_at + _PAUSE:
            tell(found)
            told_at, num_told = time.monotonic(), len(found)


def _found(workers: list[_Worker]) -> list[Record]:
    return [record for worker in workers for record in worker.records if not isinstance(record, Begun)]


class _Worker:
    """A share of a section's jobs. Where a process dies, or is stuck in a job, a new one goes on after that job."""

    def __init__(self, section: Section, context: Context, share: Share, folder: Path) -> None:
        self.records: list[Record] = []
        self._section, self._context, self._share = section, context, share
        self._log = folder / f"{share.part}.log"
        self._is_over = False
        self._start()

    def _start(self) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawning.Pipe(duplex=False)
        arguments = (self._section, self._context, self._share, theirs, self._log)
        self._process = spawning.Process(target=work, args=arguments)
        self._process.start()
        theirs.close()  # here, so that the pipe ends with the process
        self._heard_at = time.monotonic()

    def is_at_work(self) -> bool:
        if self._is_over:
            return False
        code = self._process.exitcode  # before the last records are read
        self._read()
        if code is not None:
            self._go_on("" if code in (0, MORE) else f"its process ended with {code}: {self._last_words()}", code)
        elif time.monotonic() - self._heard_at > self._section.patience:
            self._end()
            self._go_on(f"nothing was heard of it for {self._section.patience:.0f} s", -1)
        return not self._is_over

    def _read(self) -> None:
        with suppress(EOFError, OSError):  # the end of a process that died, in the middle of a record or not
            while self._pipe.poll():
                self.records.append(_decoder.decode(self._pipe.recv_bytes()))
                self._heard_at = time.monotonic()

    def _go_on(self, complaint: str, code: int) -> None:
        """After the last job that had begun; if none had, a new process would fare no better."""
        jobs = self._jobs()
        self._is_over = code == 0 or len(jobs) == self._share.num_done
        is_explained = bool(self.records) and isinstance(self.records[-1], Problem)
        if complaint and not is_explained:
            self.records.append(Problem(jobs[-1] if jobs else "start", complaint))
        if not self._is_over:
            self._share = msgspec.structs.replace(self._share, num_done=len(jobs))
            self._start()

    def _jobs(self) -> list[str]:
        return [record.job for record in self.records if isinstance(record, Begun)]

    def _last_words(self) -> str:
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"

    def stop(self) -> None:
        """Ends the worker: the deadline has come, or all jobs are done."""
        if self._process.is_alive():
            self._end()
            self._read()
            jobs = self._jobs()
            self.records.append(Problem(jobs[-1] if jobs else "start", "stopped: the section's time was over"))

    def _end(self) -> None:
        """Ends the worker with all processes that it started."""
        assert self._process.pid is not None
        send(tree_of(self._process.pid), signal.SIGKILL)
        self._process.join()
