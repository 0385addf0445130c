"""The server's handle of one engine process: its socket, its output, its end. Used in the server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.client.environment import engine_environment
from engine.config import EngineConfig
from engine.ipc.framing import FrameProtocol, from_engine_decoder
from engine.ipc.inflight_record import InflightRecord, InflightRequest, create_record_fd
from engine.ipc.messages import Failed, FromEngine, Heartbeat, Phase, Step, ToEngine
from engine.ipc.state_directory import keep_running_step

logger = logging.getLogger(__name__)

NUM_TAIL_LINES = 20
EXIT_POLL = 0.01  # seconds
KILL_GRACE = 10.0  # seconds that a killed process may take to go
OUTPUT_GRACE = 0.5  # seconds that a dead process's last bytes may take


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended, and what it was computing then."""

    exit_code: int  # negative: the signal that ended it
    batch: list[InflightRequest]
    output_tail: list[str]
    failed: Failed | None  # the last message of the process, if it sent this
    was_out_of_memory: bool  # the kernel's out-of-memory killer ran while it lived
    broken_frame: str | None
    recorded_step: Path | None = None  # the inputs of the step that it ended in, if it was asked to keep them

    def describe(self) -> str:
        """The reason of the end in one line, without anything that a client sent."""
        if self.failed is not None:
            return self.failed.message
        if self.broken_frame is not None:
            return f"the engine process sent {self.broken_frame}"
        if self.exit_code >= 0:
            return f"the engine process ended with exit code {self.exit_code}"
        reason = f"the engine process was ended by {_signal_name(-self.exit_code)}"
        if self.was_out_of_memory:
            return f"{reason}: the kernel's out-of-memory killer ran; give the machine more memory, or the engine less"
        if self.exit_code == -signal.SIGKILL:
            return f"{reason}, as the kernel's out-of-memory killer does (see dmesg), or an operator"
        return reason


class OutputTail(asyncio.Protocol):
    """Passes the child's stdout and stderr on to our stderr, and keeps the last lines for a report."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=NUM_TAIL_LINES)
        self._partial = ""
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        text = data.decode(errors="replace")
        with contextlib.suppress(OSError):  # a full disk must not end the engine
            sys.stderr.write(text)
            sys.stderr.flush()
        *lines, self._partial = (self._partial + text).split("\n")
        self._lines.extend(line[:1000] for line in lines if line.strip())
        self._partial = self._partial[-1000:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def lines(self) -> list[str]:
        return [*self._lines, self._partial] if self._partial.strip() else list(self._lines)


class EngineChild:
    """One engine process. Made by `LaunchedChild.attach`; `end` must be awaited once, whatever happened before."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        inflight: InflightRecord,
        tail: OutputTail,
        output: asyncio.ReadTransport,
        on_message: Callable[[FromEngine], None],
    ) -> None:
        self._process = process
        self._inflight = inflight
        self._tail = tail
        self._output = output
        self._oom_kills_at_start = count_oom_kills()
        self._on_message = on_message
        self._heard = True
        self.connection: FrameProtocol[FromEngine] = FrameProtocol(from_engine_decoder(), self._take)
        self.num_sent = 0
        self.step_seconds = 0.0  # age of its current step, at the last heartbeat
        self.step_limit = 0.0  # the age at which that step is hung; 0: unknown
        self.failed: Failed | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def _take(self, message: FromEngine) -> None:
        self._heard = True
        if isinstance(message, Heartbeat):
            self.step_seconds, self.step_limit = message.step_seconds, message.step_limit
        elif isinstance(message, Step | Phase):
            self.step_seconds = 0.0
        elif isinstance(message, Failed):
            self.failed = message
        self._on_message(message)

    def send(self, message: ToEngine) -> int:
        """Sends a message without blocking. Returns the frame's number, counted from 1."""
        self.connection.send(message)
        self.num_sent += 1
        return self.num_sent

    def take_heard(self) -> bool:
        """Whether any message has come since the last call."""
        heard, self._heard = self._heard, False
        return heard

    @property
    def has_ended(self) -> bool:
        return self.connection.closed.done() or self._process.poll() is not None

    def kill(self) -> None:
        """Sends SIGKILL, the one signal that ends a stopped process, too."""
        self._process.kill()

    async def end(self, *, grace: float) -> Ending:
        """Waits up to `grace` seconds for the process to go, kills it after, and releases all that belonged to it."""
        if self._broken_frame() is not None:
            self.kill()
        if not await self._exits_within(grace):
            self.kill()
            if not await self._exits_within(KILL_GRACE):
                logger.error("the engine process %d does not die: it hangs in the kernel", self.pid)
        # its last output may still be in the pipes, which a grandchild may have inherited: hence the limit
        await asyncio.wait([asyncio.gather(self.connection.closed, self._tail.closed)], timeout=OUTPUT_GRACE)
        return self._release()

    async def _exits_within(self, seconds: float) -> bool:
        """Whether the process ends in time. Polls, since the event loops' own ways to wait need signals or threads."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(EXIT_POLL)
        return True

    def _release(self) -> Ending:
        self.connection.close()
        self._output.close()
        batch = self._inflight.read()
        self._inflight.close()
        exit_code = -signal.SIGKILL if self._process.returncode is None else self._process.returncode
        return Ending(
            exit_code=exit_code,
            batch=batch,
            output_tail=self._tail.lines(),
            failed=self.failed,
            was_out_of_memory=exit_code == -signal.SIGKILL and count_oom_kills() > self._oom_kills_at_start,
            broken_frame=self._broken_frame(),
            recorded_step=keep_running_step(self.pid),
        )

    def _broken_frame(self) -> str | None:
        error = self.connection.closed.result() if self.connection.closed.done() else None
        return None if error is None else str(error)


@dataclass(slots=True)
class LaunchedChild:
    """An engine process without an event loop yet: it imports, and then waits for its Configure message."""

    process: subprocess.Popen[bytes]
    inflight: InflightRecord
    output_file: io.RawIOBase
    socket: socket.socket
    owned: contextlib.ExitStack  # closes all of the above, until `attach` takes it over

    async def attach(self, on_message: Callable[[FromEngine], None]) -> EngineChild:
        """Attaches the process to the server's event loop, once. Messages that it has sent by now are handled first."""
        loop = asyncio.get_running_loop()
        with self.owned:
            output, tail = await loop.connect_read_pipe(OutputTail, self.output_file)
            child = EngineChild(self.process, self.inflight, tail, output, on_message)
            self.socket.setblocking(False)
            await loop.create_unix_connection(lambda: child.connection, sock=self.socket)
            self.owned.pop_all()  # from here on, all of it is released by the child's `end`
        return child

    def discard(self) -> None:
        """Ends the process, unless it was attached."""
        self.owned.close()


def launch_child(factory: str, *, heartbeat_interval: float, config: EngineConfig | None = None) -> LaunchedChild:
    """Starts an engine process. Call on a thread that lives as long as the server: the kernel ends the child with it.

    config: what it will be told to run, if that is known: a model from a hub may need the hub's token.
    The child gets a session of its own, so that Ctrl-C at the terminal reaches the server alone.
    """
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        our_socket, their_socket = socket.socketpair()
        ours.callback(our_socket.close)
        theirs.callback(their_socket.close)
        read_fd, write_fd = os.pipe()
        output_file = ours.enter_context(os.fdopen(read_fd, "rb", buffering=0))
        theirs.callback(os.close, write_fd)
        record_fd = create_record_fd()
        theirs.callback(os.close, record_fd)
        inflight = InflightRecord(os.dup(record_fd))
        ours.callback(inflight.close)
        process = subprocess.Popen(
            _command(their_socket.fileno(), record_fd, factory, heartbeat_interval),
            stdin=subprocess.DEVNULL,
            stdout=write_fd,
            stderr=write_fd,
            pass_fds=(their_socket.fileno(), record_fd),
            start_new_session=True,
            env=engine_environment(os.environ, config),
        )
        ours.callback(process.wait)
        ours.callback(process.kill)
        return LaunchedChild(process, inflight, output_file, our_socket, ours.pop_all())


def _command(socket_fd: int, record_fd: int, factory: str, heartbeat_interval: float) -> list[str]:
    command = [sys.executable, "-m", "engine.process", str(socket_fd), str(record_fd), str(os.getpid())]
    return [*command, "--factory", factory, "--heartbeat-interval", str(heartbeat_interval)]


def count_oom_kills() -> int:
    """How often the kernel's out-of-memory killer ran since boot, containers included; 0 if it does not say."""
    try:
        statistics = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    found = re.search(r"^oom_kill (\d+)$", statistics, re.MULTILINE)
    return int(found[1]) if found else 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
