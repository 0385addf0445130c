"""What `peregrine run-batch` does: looks through both files, starts what answers, and runs the lines that are left."""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

import uvloop
from tqdm import tqdm

from engine.client.client import EngineClient, launch_engine
from engine.ipc.messages import EXIT_CODES, Failed
from engine.log_lines import configure_logging
from server.app import MakeEngine, create_app, make_offline_app, offline_urls
from server.cli.shutdown import first_of
from server.complain import complain
from server.config import AccessConfig, BatchesConfig, Config, TracingConfig
from server.offline.answer_file import AnswerFile, AnswerFileError
from server.offline.answer_lines import AnswerLine, TokenUsage
from server.offline.answer_writer import AnswerWriter
from server.offline.fair_slots import FairSlots
from server.offline.in_process import InProcess
from server.offline.line_keys import NO_KEYS, KeyCollector, SealedKeys, digest_of
from server.offline.line_runner import Dispatcher, LineRunner, Patience, RunEndedError
from server.offline.over_http import OverHttp, key_for_server
from server.offline.pieces import in_pieces
from server.offline.request_lines import BadLine, Line, read_lines
from server.settings import LoadedConfig
from server.state import ServerState
from server.telemetry.console import Console, process_begun_at

SOME_FAILED = 6  # exit code: every line has its answer or its error, and some have errors
NOT_ENDED = 7  # exit code: some lines have neither; the same command goes on
DEFAULT_CONCURRENCY = 64  # with a server that does not say how many requests it runs at once
REPORT_SECONDS = 30.0  # between lines of progress where there is no terminal
ROUTE = re.compile(r"/v1/[A-Za-z0-9_./-]{1,100}")


class EngineFailedError(Exception):
    """The engine will not come back."""

    def __init__(self, failure: Failed) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked for. make_engine: None for one in a process that is launched ahead of what needs it."""

    config: Config
    parsed: argparse.Namespace
    answers: AnswerFile
    make_engine: MakeEngine | None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended. code: 0 where every line has its place in the output. complaint: what to do, if anything."""

    code: int
    complaint: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where lines are answered: how many at once, and after how many seconds without an answer it is given up."""

    dispatcher: Dispatcher
    num_at_once: int
    patience: float | None


class RoutesElsewhere(Collection[str]):
    """The routes of a server elsewhere, which knows best which they are."""

    def __contains__(self, url: object) -> bool:
        return isinstance(url, str) and ROUTE.fullmatch(url) is not None

    def __iter__(self) -> Iterator[str]:
        yield "routes below /v1/"

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class Survey:
    """The lines of the input. repeated: keys of those whose custom_id another one has; keys: by which all are known"""

    num_lines: int
    repeated: frozenset[bytes]
    keys: SealedKeys


@dataclass(slots=True)
class Tally:
    """What is in the output."""

    num_done: int = 0
    num_failed: int = 0
    usage: TokenUsage = field(default_factory=TokenUsage)

    def count(self, line: AnswerLine) -> None:
        self.num_done += 1
        self.num_failed += not line.is_ok
        self.usage.add(line.usage)


class Progress:
    """How far it is: a bar on a terminal, else a line now and then."""

    def __init__(self, num_lines: int, before: Tally) -> None:
        """before: of earlier runs"""
        self._num_lines, self._before, self._now = num_lines, before, Tally()
        self._begun_at = self._told_at = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_lines, initial=before.num_done, unit="line", disable=not self._is_terminal, smoothing=0.05
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def num_done(self) -> int:
        return self._before.num_done + self._now.num_done

    @property
    def num_failed(self) -> int:
        return self._before.num_failed + self._now.num_failed

    def note(self, line: AnswerLine) -> None:
        """Counts a line of this run, and shows it."""
        self._now.count(line)
        self._bar.set_postfix(failed=self.num_failed, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if not self._is_terminal and now - self._told_at >= REPORT_SECONDS:
            self._told_at = now
            say(f"{self.num_done:,} of {self._num_lines:,} lines, {self.num_failed:,} of them with errors")

    def summary(self, output: Path) -> str:
        seconds = max(time.monotonic() - self._begun_at, 1e-9)
        text = f"{self.num_done:,} of {self._num_lines:,} lines are in {output}"
        if self.num_failed:
            text += f", {self.num_failed:,} of them with errors"
        if count := self._now.num_done:
            text += f"; {count:,} in {seconds:.1f} s, {count / seconds:.2f} lines per second"
        if tokens := self._now.usage.output_tokens:
            text += f", {tokens:,} output tokens, {tokens / seconds:.0f} per second"
        return text


class Stop:
    """Signals that ask for the end: the first lets lines in work finish for a while, the second does not."""

    def __init__(self, seconds: float) -> None:
        self.number: int | None = None
        self._seconds = seconds
        self._work: asyncio.Task[int] | None = None
        self._runner: LineRunner | None = None

    def watch(self, work: asyncio.Task[int]) -> None:
        self._work = work
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._ask, number)

    def begin(self, runner: LineRunner) -> None:
        self._runner = runner

    def _ask(self, number: int) -> None:
        assert self._work is not None
        if self.number is not None or self._runner is None:
            self.number = self.number or number
            self._work.cancel()
            return
        self.number = number
        say(f"stopping: requests in work have {self._seconds:g} s to finish; Ctrl+C ends them at once")
        self._runner.stop()
        asyncio.get_running_loop().call_later(self._seconds, self._work.cancel)


def work(loaded: LoadedConfig, parsed: argparse.Namespace, *, make_engine: MakeEngine | None = None) -> int:
    """0, SOME_FAILED, NOT_ENDED, what a server that gives up returns, or 128 and a signal's number."""
    config = _quiet(loaded)
    try:
        with (
            AnswerFile(parsed.output) as answers,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            configure_logging(config.logging)
            return runner.run(_until_stopped(Task(config, parsed, answers, make_engine)))
    except AnswerFileError as error:
        complain(f"config: {error}")
        return EXIT_CODES["config"]
    except OSError as error:
        complain(f"config: {error.filename or parsed.output}: {error.strerror or error}")
        return EXIT_CODES["config"]


async def _until_stopped(task: Task) -> int:
    stop = Stop(task.config.server.shutdown_timeout)
    running = asyncio.create_task(_work(task, stop))
    stop.watch(running)
    try:
        code = await running
    except asyncio.CancelledError:
        if stop.number is None:
            raise
        code = NOT_ENDED
    if stop.number is not None and code == NOT_ENDED:
        say("the same command goes on from here")
        return 128 + stop.number
    return code


async def _work(task: Task, stop: Stop) -> int:
    urls: Collection[str] = RoutesElsewhere() if task.parsed.url is not None else offline_urls()
    most = task.config.limits.max_body_bytes
    lines = partial(read_lines, task.parsed.input, max_line_bytes=most, urls=urls)
    survey = await _survey(lines)
    before, done = await _read_output(task, survey)
    left = _Left(lines, done, survey.repeated)
    ending = Ending(0)
    with Progress(survey.num_lines, before) as progress:
        if not await left.is_nothing():
            ending = await _answer(task, left, progress, stop)
    await asyncio.to_thread(task.answers.sync)
    say(progress.summary(task.answers.path))
    if ending.complaint:
        complain(ending.complaint)
    return ending.code or (SOME_FAILED if progress.num_failed else 0)


async def _read_output(task: Task, survey: Survey) -> tuple[Tally, SealedKeys]:
    """What the output has of this input's lines, and which those are."""
    before, done, num_strange = Tally(), KeyCollector(), 0
    async for answer in in_pieces(task.answers.answers()):
        if answer.key in survey.keys:
            before.count(answer)
            done.add(answer.key)
        else:
            num_strange += 1
    if num_strange:
        say(
            f"{num_strange:,} lines of {task.answers.path} belong to no line of {task.parsed.input}, and are left alone"
        )
    return before, done.sealed()


async def _answer(task: Task, left: _Left, progress: Progress, stop: Stop) -> Ending:
    """Runs the lines that are left."""
    answers = task.answers
    try:
        async with (
            _engine(task) if task.parsed.url is None else _server(task) as place,
            AnswerWriter(answers, answers, waits_for_room=False, written=progress.note) as writer,
        ):
            slots = FairSlots(lambda: place.num_at_once)
            runner = LineRunner(place.dispatcher, writer, slots, patience=Patience(place.patience))
            stop.begin(runner)
            await runner.run(left.lines())
    except EngineFailedError as error:
        return Ending(EXIT_CODES[error.failure.kind], f"{error.failure.kind}: {error}")
    except RunEndedError as error:
        return Ending(NOT_ENDED, f"{error}; the same command goes on from here")
    except OSError as error:
        reason = f"{answers.path}: {error.strerror or error}"
        return Ending(NOT_ENDED, f"{reason}; make room, and the same command goes on from here")
    return Ending(0 if stop.number is None else NOT_ENDED)


class _Left:
    """The lines of the input that have no place in the output yet."""

    def __init__(self, read: Callable[[], Iterator[Line]], done: SealedKeys, repeated: frozenset[bytes]) -> None:
        self._read, self._done, self._repeated = read, done, repeated

    async def is_nothing(self) -> bool:
        async for _ in self.lines():
            return False
        return True

    async def keys(self) -> SealedKeys:
        """Of all of them."""
        found = KeyCollector()
        async for line in self.lines():
            found.add(line.key)
        return await asyncio.to_thread(found.sealed)

    async def lines(self) -> AsyncIterator[Line]:
        seen: set[bytes] = set()
        async for line in in_pieces(self._read()):
            checked = self._once(line, seen)
            if checked.key not in self._done:
                yield checked

    def _once(self, line: Line, seen: set[bytes]) -> Line:
        """A line whose custom_id an earlier one has is an error: its answer could not be told from the other's."""
        if isinstance(line, BadLine) or line.key not in self._repeated:
            return line
        if line.key not in seen:
            seen.add(line.key)
            return line
        message = f"line {line.number}: custom_id is that of an earlier line; give each line one of its own"
        digest = digest_of(line.custom_id.encode())
        return BadLine(line.number, line.custom_id, "duplicate_custom_id", message, "custom_id", digest)


async def _survey(read: Callable[[], Iterator[Line]]) -> Survey:
    keys, num_lines = KeyCollector(), 0
    async for line in in_pieces(read()):
        num_lines += 1
        keys.add(line.key)
    sealed = await asyncio.to_thread(keys.sealed)
    repeated = await asyncio.to_thread(sealed.repeated)
    if repeated:  # the later ones are errors, which are known by another key
        sealed = await _Left(read, NO_KEYS, repeated).keys()
    return Survey(num_lines, repeated, sealed)


@asynccontextmanager
async def _server(task: Task) -> AsyncIterator[Place]:
    """A server elsewhere. Raises RunEndedError where none answers."""
    parsed = task.parsed
    async with OverHttp(
        parsed.url, key=key_for_server(task.config.server.api_keys), max_connections=parsed.concurrency
    ) as server:
        await server.check()
        num_at_once = parsed.concurrency
        if num_at_once is None:
            num_seats = await server.max_num_seqs()
            num_at_once = 2 * num_seats if num_seats is not None else DEFAULT_CONCURRENCY
        yield Place(server, num_at_once, parsed.patience)


@asynccontextmanager
async def _engine(task: Task) -> AsyncIterator[Place]:
    """A model in an engine of this process. Raises EngineFailedError."""
    config = task.config
    console = Console(config, sys.stderr, begun_at=process_begun_at())
    with ExitStack() as ends:
        make_engine = task.make_engine
        if make_engine is None:
            launched = launch_engine(config)
            ends.callback(launched.discard)
            make_engine = partial(EngineClient, first_child=launched)
        app = create_app(config, observers=[console], make_engine=make_engine)
        state: ServerState = app.state.server
        async with app.router.lifespan_context(app):
            await first_of(state.first_ready.wait(), state.failed.wait())
            if state.failure is not None:
                raise EngineFailedError(state.failure)
            dispatcher = InProcess(make_offline_app(state), tenant=lambda: "", is_ending=lambda: state.is_ending)
            try:
                yield Place(dispatcher, task.parsed.concurrency or 2 * state.num_seats, None)
            except RunEndedError:
                if state.failure is not None:
                    raise EngineFailedError(state.failure) from None
                raise


def _quiet(loaded: LoadedConfig) -> Config:
    """The config without what only a server does; and its log without news, unless they are asked for."""
    config = loaded.config.model_copy(
        update={"batches": BatchesConfig(), "access": AccessConfig(log=False), "tracing": TracingConfig()}
    )
    if "logging.level" in loaded.sources:
        return config
    return config.model_copy(update={"logging": config.logging.model_copy(update={"level": "warning"})})


def say(text: str) -> None:
    """Writes a line for the person at the terminal; it is lost where it cannot be written."""
    try:
        tqdm.write(f"run-batch: {text}", file=sys.stderr)
    except OSError:
        return
