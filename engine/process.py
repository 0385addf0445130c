"""The engine process: `python -m engine.process FD`, started by `engine.client.engine_process` and by nobody else.

It talks over the inherited socket FD: takes a Configure frame, builds the engine, says Ready, and steps while there is
work. It never outlives its parent: the kernel kills it with the parent, and the end of the socket ends it too.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from engine.config import EngineConfig, LoggingConfig
from engine.ipc.framing import FrameError, FrameSocket, to_engine_decoder
from engine.ipc.inflight_record import InflightRecord
from engine.ipc.messages import (
    EXIT_CODES,
    Abort,
    Add,
    Configure,
    Failed,
    Heartbeat,
    ModelInfo,
    Phase,
    Ready,
    Shutdown,
    Step,
    ToEngine,
)
from engine.lazy_import import load_object
from engine.log_lines import adjust_logging, configure_logging
from engine.memory_errors import is_out_of_memory
from engine.scheduling.step_patience import StepPatience, StepSize, size_of
from engine.types import Request, Scheduled, StepOutput, StepStats

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class SteppedEngine(Protocol):
    """The interface of the engine to this process. `on_batch` gets each batch before it is computed."""

    on_batch: Callable[[list[Scheduled]], None]

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> tuple[list[StepOutput], list[str], StepStats | None]:
        """Runs one step. Also called once without work after an abort, so that statistics show the freed memory."""
        ...


Report = Callable[[str, str], None]
EngineFactory = Callable[[EngineConfig, Report], tuple[SteppedEngine, ModelInfo]]
Connection = FrameSocket[ToEngine]


class HeartbeatSender:
    """A daemon thread that sends heartbeats: the age of the main thread's step, and the age at which it is hung."""

    def __init__(self, connection: Connection, *, interval: float) -> None:
        self._connection = connection
        self._interval = interval
        self._step_started_at: float | None = None
        self._limits: list[Callable[[], float]] = []  # of the step's parts
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def step_started(self) -> None:
        self._limits = []
        self._step_started_at = time.monotonic()

    def allow(self, limit: Callable[[], float]) -> None:
        """Adds seconds to the time that the step may take. Called in this thread, and only for steps that take long."""
        self._limits.append(limit)

    def step_ended(self) -> None:
        self._step_started_at = None

    def _beat(self) -> None:
        while True:
            time.sleep(self._interval)
            started_at = self._step_started_at
            age = limit = 0.0
            if started_at is not None:
                age, limit = time.monotonic() - started_at, sum(seconds() for seconds in list(self._limits))
            try:
                self._connection.send(Heartbeat(age, limit))
            except OSError:  # the server is gone, and the main thread may sit in a step that never ends
                os._exit(0)


class EngineLoop:
    """Carries messages to the engine and its outputs back, one frame per step."""

    def __init__(
        self,
        engine: SteppedEngine,
        connection: Connection,
        inflight: InflightRecord,
        heartbeats: HeartbeatSender,
        patience: StepPatience,
    ) -> None:
        self._engine = engine
        self._connection = connection
        self._inflight = inflight
        self._heartbeats = heartbeats
        self._patience = patience
        self._size = StepSize(0, 0)  # of the step that runs
        engine.on_batch = self._expect
        self._num_received = 1  # the Configure frame
        self._refused: list[StepOutput] = []
        self._aborted = False

    def run(self) -> None:
        """Returns when asked to shut down. Raises EOFError when the server is gone."""
        while self._take_in():
            outputs, started, stats = self._step()
            outputs, self._refused = self._refused + outputs, []
            if outputs or started or stats is not None:
                self._connection.send(Step(outputs, started, stats, self._num_received))

    def _take_in(self) -> bool:
        """Handles what arrived; sleeps while there is nothing to do. False: shut down."""
        has_work = self._engine.has_work
        while True:
            for message in self._connection.receive(wait=not has_work):
                self._num_received += 1
                if isinstance(message, Shutdown):
                    return False
                self._handle(message)
            has_work = self._engine.has_work or self._aborted or bool(self._refused)
            if has_work:
                return True

    def _handle(self, message: ToEngine) -> None:
        if isinstance(message, Abort):
            for request_id in message.request_ids:
                self._engine.abort(request_id)
            self._aborted = True
        elif isinstance(message, Add):
            self._add(message.request)

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except Exception as error:  # border: a request that cannot even be queued fails alone
            if not isinstance(error, ValueError):
                traceback.print_exc()
            self._refused.append(StepOutput(request_id=request.request_id, finish_reason="error", error=str(error)))

    def _expect(self, batch: list[Scheduled]) -> None:
        """Called before a batch is computed, and again before each item of one that failed as a whole."""
        self._inflight.write(batch)
        size = size_of(batch)
        self._size = StepSize(self._size.num_tokens + size.num_tokens, self._size.num_pairs + size.num_pairs)
        self._heartbeats.allow(lambda: self._patience.limit(size))

    def _step(self) -> tuple[list[StepOutput], list[str], StepStats | None]:
        if not (self._engine.has_work or self._aborted):
            return [], [], None
        self._aborted = False
        self._size = StepSize(0, 0)
        started_at = time.monotonic()
        self._heartbeats.step_started()
        result = self._engine.step()
        self._inflight.clear()
        self._heartbeats.step_ended()
        if self._size.num_tokens:
            self._patience.learn(self._size, time.monotonic() - started_at)
        return result


def run(connection: Connection, inflight: InflightRecord, *, factory: str, heartbeat_interval: float) -> int:
    """Runs the engine until the server ends it. Returns the exit code; every failure was reported to the server."""
    heartbeats = HeartbeatSender(connection, interval=heartbeat_interval)
    try:
        gc.disable()  # imports make a million objects that stay: to look through them for garbage takes 0.6 s of 4
        build = load_factory(factory)  # the server may still be busy with its own
        gc.freeze()
        gc.enable()
        config = _receive_config(connection)
        adjust_logging(config.logging)
    except EOFError:  # the server ended before it said what to run
        return 0
    except Exception as error:
        return _fail(connection, describe_failure(error), error)
    try:
        engine, model = build(config, lambda name, detail: connection.send(Phase(name, detail)))
    except Exception as error:  # border: whatever went wrong becomes a message and an exit code
        return _fail(connection, describe_failure(error), error)
    gc.collect()
    gc.freeze()  # what was loaded stays: the collector need not walk it in every pause
    try:
        connection.send(Ready(model))
        EngineLoop(engine, connection, inflight, heartbeats, StepPatience(model)).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:  # border: the server starts a new process and replays
        return _fail(connection, Failed("internal", _summary(error)), error)
    return 0


def _receive_config(connection: Connection) -> EngineConfig:
    messages: list[ToEngine] = []
    while not messages:
        messages = connection.receive(wait=True)
    if len(messages) != 1 or not isinstance(messages[0], Configure):
        raise FrameError("the first frame must be Configure, and nothing may follow it before Ready")
    return EngineConfig.model_validate_json(messages[0].config_json)


def load_factory(name: str) -> EngineFactory:
    """Finds the function that builds the engine: "package.module:function" or "path/to/file.py:function"."""
    place, _, function = name.rpartition(":")
    if not place.endswith(".py"):
        return cast(EngineFactory, load_object(name))
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    loaded: EngineFactory = getattr(module, function)
    return loaded


def describe_failure(error: Exception) -> Failed:
    """The message for a failed start, by its kind; the text of a user's error is kept as it is."""
    if is_out_of_memory(error):
        return Failed("memory", f"out of memory: {_root_cause(error)}")
    if isinstance(error, ValueError):
        kind = getattr(error, "kind", "config")  # a subclass may name its kind, as ModelError does
        return Failed(kind if kind in EXIT_CODES else "config", str(error) or _summary(error))
    return Failed("internal", _summary(error))


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _summary(error: Exception) -> str:
    """The error and, last, its root cause with the place it was raised at."""
    cause = _root_cause(error)
    outer = "" if cause is error else f"{type(error).__name__}: {error}; because of "
    frames = traceback.extract_tb(cause.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{outer}{type(cause).__name__}: {cause}{place}"


def _fail(connection: Connection, failed: Failed, error: Exception) -> int:
    if not _was_raised_here(error):
        traceback.print_exception(error)
    try:
        connection.send(failed)
    except OSError:
        return 0
    return EXIT_CODES[failed.kind]


def _was_raised_here(error: Exception) -> bool:
    """Whether our own code raised it for a user: then its text has the fix, and no traceback is shown."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parent)
    return isinstance(error, ValueError) and bool(frames) and frames[-1].filename.startswith(package)


def tie_to_parent(parent: int) -> None:
    """Lets the kernel kill this process when the parent dies, and ends it at once if that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.process", description=__doc__)
    parser.add_argument("fd", type=int, help="the socket to the server")
    parser.add_argument("record_fd", type=int, help="the shared memory of the in-flight record")
    parser.add_argument("parent", type=int, help="the server's process id")
    parser.add_argument("--factory", default="engine.build:build_engine")
    parser.add_argument("--heartbeat-interval", type=float, default=1.0, help="seconds")
    options = parser.parse_args(arguments)
    tie_to_parent(options.parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or service manager signals the whole group: the
        signal.signal(number, signal.SIG_IGN)  # server drains first, and then says when this process ends
    faulthandler.enable()
    configure_logging(LoggingConfig())  # until the config has come
    connection = FrameSocket(socket.socket(fileno=options.fd), to_engine_decoder())
    inflight = InflightRecord(options.record_fd)
    return run(connection, inflight, factory=options.factory, heartbeat_interval=options.heartbeat_interval)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # no teardown of thread pools and devices, which may take seconds or crash
