"""The supervisor keeps an engine process running: it starts, watches, kills and restarts it, or gives up.

All of it runs in the server's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from engine.client.crash_report import CrashReport, installed_versions, write_crash_report
from engine.client.deaths import Deaths, Verdict, describe_death
from engine.client.descriptor_reserve import DescriptorReserve
from engine.client.engine_process import Ending, EngineChild, LaunchedChild, launch_child
from engine.config import EngineConfig
from engine.ipc.messages import Configure, Failed, FromEngine, ModelInfo, Phase, Ready, Shutdown, Step, ToEngine
from engine.types import StepStats

logger = logging.getLogger(__name__)

PASSING_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})  # of starting a process


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"  # it will not come back
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class SupervisionLimits:
    """When the engine process is held to be hung, and how long is waited for what. Times in seconds.

    When it is not worth another try is for operators to say, and what `step` is: `engine.config.SupervisionConfig`.
    """

    silence: float = 5.0  # without a frame, heartbeats included
    starting_silence: float = 60.0  # the same before it is ready: imports may hold the interpreter for long
    step: float = 120.0  # one step, or none while requests run; more where the engine expects it to take long
    heartbeat_interval: float = 1.0
    check_interval: float = 0.25
    stop_grace: float = 5.0  # from Shutdown to SIGKILL
    first_backoff: float = 0.1  # doubles with each death in the operators' window
    max_backoff: float = 5.0


class EngineObserver(Protocol):
    """The interface of metrics and logs to the engine's events. Called in the event loop; must not block or raise."""

    def on_phase(self, name: str, detail: str) -> None: ...

    def on_ready(self, model: ModelInfo) -> None: ...

    def on_step(self, stats: StepStats) -> None: ...

    def on_started(self, request_id: str, waited_seconds: float) -> None:
        """Called when a request runs for the first time; not again when it is replayed."""
        ...

    def on_death(self, reason: str) -> None: ...

    def on_replay(self, num_requests: int) -> None: ...


class Listener(Protocol):
    """The interface of the owner of the requests, the dispatcher."""

    @property
    def has_work(self) -> bool:
        """Whether the process has requests to compute."""
        ...

    def engine_ready(self, send: Callable[[ToEngine], int], model: ModelInfo) -> None:
        """Called when a new process is ready, without requests. `send` returns the number of the frame."""
        ...

    def engine_stepped(self, step: Step) -> None: ...

    def engine_died(self, batch_ids: list[str]) -> Verdict:
        """Called when the process has died; another starts unless `engine_gone` follows. `batch_ids`: of its step."""
        ...

    def engine_gone(self, kind: str, message: str) -> None:
        """Called when no process will follow."""
        ...


class Supervisor:
    """Runs one engine process at a time, until `stop` or until it gives up (`engine.client.deaths`)."""

    def __init__(
        self,
        config: EngineConfig,
        observer: EngineObserver,
        listener: Listener,
        *,
        limits: SupervisionLimits,
        factory: str,
        first_child: LaunchedChild | None = None,
    ) -> None:
        """first_child: a process of this factory, launched before there was an event loop."""
        # only the engine's own sections: the server's subclass of the config holds keys that must not cross
        self._config_json = config.model_dump_json(include=set(EngineConfig.model_fields))
        self._config = config
        self._observer = observer
        self._listener = listener
        self._limits = limits
        self._factory = factory
        self._launched = first_child
        self._child: EngineChild | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._wake = asyncio.Event()  # set when the socket has ended, and by `stop`
        self._has_been_ready = False  # the process that runs, or ran last
        self._has_stepped = False  # the same
        self._has_progressed = False  # since the last look
        self._deaths = Deaths(config.supervision)
        self._reserve = DescriptorReserve()
        self.state = EngineState.STARTING
        self.phase = "process"
        self.phase_detail = ""
        self.model: ModelInfo | None = None
        self.failure: Failed | None = None
        self.failed = asyncio.Event()
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        """The process id of the engine process, if one runs."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        assert self._task is None, "started twice"
        self._task = asyncio.get_running_loop().create_task(self._run(), name="engine supervisor")

    async def stop(self) -> None:
        """Ends the process, with SIGKILL after a grace period. May be called in any state, and again."""
        was_ready = self.state is EngineState.READY
        if self.state not in (EngineState.FAILED, EngineState.STOPPED):
            self.state = EngineState.STOPPED
            self._listener.engine_gone("stopped", "the server is shutting down")
        self._stopping = True
        self._wake.set()
        if self._child is not None:
            if was_ready:
                self._child.send(Shutdown())
            else:
                self._child.kill()  # it does not read its inbox yet, and has nothing to lose
        if self._task is not None:
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        try:
            while not self._stopping and await self._live_once():
                await self._back_off()
                self.num_restarts += not self._stopping
        except Exception as error:  # border: no process could be started, or the supervision has a bug
            logger.exception("the supervision of the engine process failed")
            self._fail(Failed("internal", f"cannot run the engine process: {error}"))
        finally:
            self._reserve.release()

    async def _live_once(self) -> bool:
        """Runs one process from its start to its end. Returns whether another should be started."""
        launched, self._launched = self._launched, None
        launched = launched or await self._launch()
        if launched is None:
            return False
        self._reserve.fill()
        self._child = child = await launched.attach(self._take)
        self._has_been_ready = self._has_stepped = False
        try:
            child.connection.closed.add_done_callback(lambda closed: self._wake.set())
            child.send(Configure(self._config_json))
            hang = await self._watch(child)
        except BaseException:
            child.kill()
            raise
        finally:
            ending = await child.end(grace=self._limits.stop_grace if self._stopping else 1.0)
            self._reserve.fill()  # with the descriptors of the child, before a connection takes them
            self._child = None
        if self._stopping:
            return False
        return self._judge(ending, hang or ending.describe())

    async def _launch(self) -> LaunchedChild | None:
        """Starts a process, and tries again while the system lacks resources. None if it was stopped meanwhile."""
        while not self._stopping:
            try:
                with self._reserve.lent():
                    interval = self._limits.heartbeat_interval
                    return launch_child(self._factory, heartbeat_interval=interval, config=self._config)
            except OSError as error:
                if self.model is None or error.errno not in PASSING_ERRORS:
                    raise
                logger.warning("the engine process cannot be started now: %s; trying again", error.strerror)
                self._enter_phase("process", f"cannot be started now: {error.strerror}")
            await self._back_off()
        return None

    def _take(self, message: FromEngine) -> None:
        if self._stopping:
            return
        if isinstance(message, Step):
            self._has_stepped = True
            self._has_progressed |= _is_progress(message)
            if message.outputs:
                self._deaths.note_progress()
            if message.stats is not None:
                self._observer.on_step(message.stats)
            self._listener.engine_stepped(message)
        elif isinstance(message, Phase):
            self._enter_phase(message.name, message.detail)
        elif isinstance(message, Ready):
            self._become_ready(message.model)

    def _enter_phase(self, name: str, detail: str) -> None:
        self.phase, self.phase_detail = name, detail
        self._observer.on_phase(name, detail)

    def _become_ready(self, model: ModelInfo) -> None:
        assert self._child is not None
        self._has_been_ready = True
        self.model = model
        self.state = EngineState.READY
        self.phase, self.phase_detail = "ready", ""
        self._observer.on_ready(model)
        self._listener.engine_ready(self._child.send, model)

    async def _watch(self, child: EngineChild) -> str | None:
        """Waits for the end of the process, and kills it when it hangs; the reason, if it did."""
        loop = asyncio.get_running_loop()
        silent, stalled, last = 0.0, 0.0, loop.time()
        while not child.has_ended and not self._stopping:
            await self._sleep(self._limits.check_interval)
            now = loop.time()
            # after a long pause of this process (a stopped terminal job, a blocked loop), no messages can be expected
            passed, last = min(now - last, 2 * self._limits.check_interval), now
            silent = 0.0 if child.take_heard() else silent + passed
            stalled = stalled + passed if self._is_stalled() else 0.0
            hang = self._find_hang(child, silent, stalled)
            if hang is not None:
                if self.state is EngineState.READY:
                    self.state = EngineState.RESTARTING
                child.kill()
                return hang
        return None

    def _is_stalled(self) -> bool:
        """Whether nothing was computed since the last look, though the process has something to compute."""
        has_progressed, self._has_progressed = self._has_progressed, False
        return self.state is EngineState.READY and self._listener.has_work and not has_progressed

    def _find_hang(self, child: EngineChild, silent: float, stalled: float) -> str | None:
        is_ready = self.state is EngineState.READY
        limit = self._limits.silence if is_ready else self._limits.starting_silence
        if silent > limit:
            return f"the engine process gave no sign of life for {limit:g} s"
        limit = max(self._limits.step, child.step_limit)
        if child.step_seconds > limit:
            return f"a step of the engine took longer than {limit:.3g} s"
        if stalled > limit + self._limits.silence:  # later than a step that hangs, which is known for whom it was
            return f"the engine has computed nothing for {stalled:.3g} s, though it has requests"
        return None

    def _judge(self, ending: Ending, reason: str) -> bool:
        death = describe_death(ending, reason=reason, was_ready=self._has_been_ready, has_stepped=self._has_stepped)
        if self.model is None:
            self._fail(_startup_failure(ending, reason))
            return False
        self.state = EngineState.RESTARTING
        self._enter_phase("process", reason)
        recorded = ending.recorded_step
        replay = "" if recorded is None else f"; to run that step again: python -m engine.replay {recorded}"
        logger.error("%s; %d requests were in the step%s", reason, len(ending.batch), replay)
        self._observer.on_death(reason)
        self._deaths.add(death, self._listener.engine_died([line.request_id for line in ending.batch]))
        excess = self._deaths.describe_excess()
        if excess is not None:
            self._fail(self._crash_loop(excess, reason))
            return False
        return True

    def _crash_loop(self, excess: str, reason: str) -> Failed:
        report = CrashReport(
            written_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            reason=reason,
            architecture=None if self.model is None else self.model.architecture,
            fingerprint=None if self.model is None else self.model.fingerprint,
            versions=installed_versions(),
            deaths=list(self._deaths.recent),
        )
        path = write_crash_report(report)
        where = "" if path is None else f"; crash report: {path}"
        return Failed("crash_loop", f"{excess}, last: {reason}{where}")

    def _fail(self, failure: Failed) -> None:
        logger.error("the engine will not come back: %s", failure.message)
        self.failure = failure
        self.state = EngineState.FAILED
        self._listener.engine_gone("engine_failed", "the engine stopped working and will not come back")
        self.failed.set()

    async def _back_off(self) -> None:
        num_before = max(self._deaths.num_in_window(time.time()) - 1, 0)
        delay = min(self._limits.first_backoff * 2**num_before, self._limits.max_backoff)
        self._wake.clear()
        if not self._stopping:
            await self._sleep(delay)
        self._wake.clear()

    async def _sleep(self, seconds: float) -> None:
        """Sleeps for so many seconds, or until woken."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()


def _is_progress(step: Step) -> bool:
    """Whether a step computed anything. Those without sequences come when requests were aborted; an engine that makes
    nothing else goes around in circles."""
    return bool(step.outputs or step.started or (step.stats is not None and step.stats.num_tokens))


def _startup_failure(ending: Ending, reason: str) -> Failed:
    if ending.failed is not None:
        return ending.failed
    tail = "".join(f"\n  {line}" for line in ending.output_tail)
    kind = "memory" if ending.was_out_of_memory else "internal"
    return Failed(kind, f"{reason} while it started" + (f"; its last output was:{tail}" if tail else ""))
