"""The engine process, spoken to directly over its socket, and the deaths of whoever started it."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator

import pytest

from engine.ipc.framing import HEADER, FrameSocket, encode_frame, from_engine_decoder
from engine.ipc.inflight_record import RECORD_BYTES, InflightRecord, InflightRequest, create_record_fd
from engine.ipc.messages import (
    EXIT_CODES,
    Abort,
    Add,
    Configure,
    Failed,
    FromEngine,
    Heartbeat,
    Phase,
    Ready,
    Shutdown,
    Step,
)
from engine.process import describe_failure, load_factory
from engine.types import Scheduled, Sequence
from tests import ROOT
from tests.support import scripted_engine
from tests.support.scripted_client import FACTORY, make_config, make_request, process_state


class Child:
    """An engine process as its parent sees it, without supervision."""

    def __init__(self, *, parent: int | None = None) -> None:
        ours, theirs = socket.socketpair()
        record_fd = create_record_fd()
        self.inflight = InflightRecord(os.dup(record_fd))
        self.socket = ours
        self.frames = FrameSocket(ours, from_engine_decoder())
        self.received: deque[FromEngine] = deque()
        command = [sys.executable, "-m", "engine.process", str(theirs.fileno()), str(record_fd)]
        command += [str(parent or os.getpid()), "--factory", FACTORY, "--heartbeat-interval", "0.05"]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(), record_fd), cwd=ROOT, stderr=subprocess.PIPE
        )
        theirs.close()
        os.close(record_fd)

    def configure(self, options: str = "") -> None:
        self.frames.send(Configure(make_config(options).model_dump_json()))

    def receive(self, kind: type[FromEngine]) -> FromEngine:
        """The next message of that kind."""
        return next(message for message in self.messages() if isinstance(message, kind))

    def messages(self) -> Iterator[FromEngine]:
        """All until the end of the socket. Those that came together with the last one taken are the next ones."""
        while True:
            while self.received:
                yield self.received.popleft()
            try:
                self.received.extend(self.frames.receive(wait=True))
            except EOFError:
                return

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.socket.close()
        self.inflight.close()


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


def test_a_start_is_phases_then_ready_then_one_frame_per_step(child: Child) -> None:
    child.configure("delay=0")
    assert child.receive(Phase) == Phase("weights", "half of them")
    assert child.receive(Ready).model.architecture == "Scripted"
    request = make_request("r", num_prompt_tokens=20, max_tokens=10)
    child.frames.send(Add(request))
    steps: list[Step] = []
    for message in child.messages():
        if isinstance(message, Step):
            steps.append(message)
            if message.outputs and message.outputs[-1].finish_reason:
                break
    assert [token for step in steps for output in step.outputs for token in output.token_ids] == (
        scripted_engine.expected_tokens(request)
    )
    assert steps[0].started == ["r"]
    assert all(step.num_received == 2 and step.stats is not None for step in steps)
    assert child.inflight.read() == []  # nobody is blamed for a death between two steps
    child.frames.send(Shutdown())
    assert child.process.wait(10) == 0


def test_an_idle_process_beats_and_works_on_nothing(child: Child) -> None:
    child.configure()
    child.receive(Ready)
    beats = [message for _, message in zip(range(5), child.messages(), strict=False)]
    assert beats == [Heartbeat(0.0)] * 5


def test_an_abort_is_answered_with_statistics_that_say_the_engine_is_empty(child: Child) -> None:
    child.configure("delay=0.01")
    child.receive(Ready)
    child.frames.send(Add(make_request("r", max_tokens=3000)))
    child.receive(Step)
    child.frames.send(Abort(["r", "unknown"]))
    steps = (message for message in child.messages() if isinstance(message, Step))
    last = next(step for step in steps if step.num_received == 3)
    assert (last.outputs, last.stats.num_running, last.stats.num_owned_blocks) == ([], 0, 0)


def test_a_heartbeat_tells_the_age_of_a_step_that_hangs(child: Child) -> None:
    child.configure()
    child.receive(Ready)
    child.frames.send(Add(make_request("r", order=scripted_engine.HANG)))
    ages: list[float] = []
    for message in child.messages():
        assert isinstance(message, Heartbeat)
        ages.append(message.step_seconds)
        if message.step_seconds > 0.3:
            break
    assert ages == sorted(ages)
    assert child.inflight.read() == [InflightRequest("r", 0, scripted_engine.CHUNK, 0)]


@pytest.mark.parametrize("moment", ["before the config", "idle", "in a step that hangs"])
def test_the_end_of_the_socket_ends_the_process(child: Child, moment: str) -> None:
    if moment != "before the config":
        child.configure()
        child.receive(Ready)
    if moment == "in a step that hangs":
        child.frames.send(Add(make_request("r", order=scripted_engine.HANG)))
        time.sleep(0.1)
    child.socket.shutdown(socket.SHUT_RDWR)
    child.socket.close()
    assert child.process.wait(5) == 0


def test_a_process_whose_parent_is_gone_ends_at_once() -> None:
    child = Child(parent=1)  # not this process: as if the parent had died before the child was ready to be tied to it
    try:
        assert child.process.wait(10) == 0
    finally:
        child.close()


@pytest.mark.parametrize("is_ready", [False, True])
def test_corrupt_frames_end_the_process_with_a_reason(child: Child, is_ready: bool) -> None:
    if is_ready:
        child.configure()
        child.receive(Ready)
    child.socket.sendall(HEADER.pack(5) + b"\xc1\xc1\xc1\xc1\xc1")
    failed = child.receive(Failed)
    assert failed.kind == "internal"
    assert "FrameError" in failed.message
    assert child.process.wait(10) == EXIT_CODES["internal"]


def test_random_bytes_never_leave_a_process_that_neither_ends_nor_answers() -> None:
    chance = random.Random(4)
    for _ in range(4):
        child = Child()
        try:
            child.configure()
            child.receive(Ready)
            frame = encode_frame(Add(make_request("r")))
            for _ in range(5):
                frame[chance.randrange(HEADER.size, len(frame))] = chance.randrange(256)
            child.frames.send(Shutdown()) if chance.random() < 0.2 else child.socket.sendall(bytes(frame))
            child.socket.sendall(bytes(encode_frame(Shutdown())))
            assert child.process.wait(10) in (0, EXIT_CODES["internal"])
        finally:
            child.close()


@pytest.mark.parametrize(
    ("order", "kind"), [("config", "config"), ("model", "model"), ("memory", "memory"), ("chained", "internal")]
)
def test_a_failed_start_is_told_and_is_the_exit_code(child: Child, order: str, kind: str) -> None:
    child.configure(f"fail={order}")
    assert child.receive(Failed).kind == kind
    assert child.process.wait(10) == EXIT_CODES[kind]


def test_an_unusable_config_is_a_config_failure(child: Child) -> None:
    child.frames.send(Configure('{"model": {"no_such_key": 1}}'))
    failed = child.receive(Failed)
    assert failed.kind == "config"
    assert "no_such_key" in failed.message
    assert child.process.wait(10) == EXIT_CODES["config"]


def test_kill_9_of_the_parent_leaves_no_engine_process() -> None:
    code = """
import asyncio
from tests.support.scripted_client import make_client, make_request, read_one

async def main():
    client = make_client("delay=0.01")
    await client.start()
    async for output in read_one(client, make_request("r", max_tokens=100000)):
        print(client.pid, flush=True)

asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert process_state(pid) not in ("", "Z")
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while process_state(pid) not in ("", "Z"):
        assert time.monotonic() < deadline, "the engine process outlives its parent"
        time.sleep(0.02)


def make_batch(num_seqs: int, *, name: str = "r") -> list[Scheduled]:
    return [
        Scheduled(Sequence(make_request(f"{name}{i}"), [], num_computed_tokens=i), 2 * i + 1, 0, samples=True)
        for i in range(num_seqs)
    ]


def test_the_inflight_record_is_seen_through_the_other_mapping() -> None:
    fd = create_record_fd()
    ours, theirs = InflightRecord(os.dup(fd)), InflightRecord(fd)
    assert ours.read() == []
    theirs.write(make_batch(100))
    assert ours.read() == [InflightRequest(f"r{i}", i, 2 * i + 1, 0) for i in range(100)]
    theirs.write(make_batch(2))
    assert [line.request_id for line in ours.read()] == ["r0", "r1"]
    theirs.write(make_batch(3, name="x" * (RECORD_BYTES // 2)))  # does not fit: the first does
    assert [line.num_computed_tokens for line in ours.read()] == [0]
    theirs.clear()
    assert ours.read() == []
    ours.close()
    theirs.close()


def test_a_damaged_inflight_record_reads_as_an_empty_one() -> None:
    fd, chance = create_record_fd(), random.Random(1)
    record = InflightRecord(os.dup(fd))
    for _ in range(200):
        record.write(make_batch(3))
        os.pwrite(fd, chance.randbytes(chance.randint(1, 8)), chance.randint(0, 20))
        assert all(isinstance(line, InflightRequest) for line in record.read())
    record.close()
    os.close(fd)


def test_errors_are_sorted_by_what_can_be_done_about_them() -> None:
    class OutOfMemoryError(RuntimeError):
        """Named as torch's."""

    assert describe_failure(ValueError("lower it")) == Failed("config", "lower it")
    assert describe_failure(scripted_engine.ModelError("no such file")) == Failed("model", "no such file")
    assert describe_failure(OutOfMemoryError("9 GiB")).kind == "memory"
    assert describe_failure(KeyError("x")) == Failed("internal", "KeyError: 'x'")
    assert set(EXIT_CODES) == {"internal", "config", "memory", "model", "crash_loop"}
    assert len(set(EXIT_CODES.values())) == 5


def test_a_factory_is_found_by_module_or_by_path() -> None:
    assert load_factory("json:dumps")({"a": 1}) == '{"a": 1}'
    engine, model = load_factory(FACTORY)(make_config(), lambda name, detail: None)
    assert not engine.has_work
    assert model.architecture == "Scripted"
