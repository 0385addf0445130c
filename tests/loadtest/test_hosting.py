"""Servers that a comparison starts, pauses and ends itself: real processes."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from loadtest.cli import main
from loadtest.compare.launch import LaunchedServer, without_keys
from loadtest.compare.processes import memory_of, pause, resume, tree_of
from loadtest.report.session import Session, load
from tests.support import answering_process
from tests.support.scripted_server import whole_answer

PROGRAM = Path(answering_process.__file__)
SMALL = ["--prompt", "4", "--output", "2", "--warmup", "0", "--concurrency", "1", "--requests", "2"]


@dataclass(frozen=True)
class Prepared:
    """A server that is not started yet."""

    name: str
    url: str
    command: str
    log: Path

    @property
    def arguments(self) -> list[str]:
        return ["--peer", f"{self.name}={self.url}", "--peer-command", f"{self.name}={self.command}"]

    def times(self, word: str) -> list[float]:
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [float(moment) for what, moment in lines if what == word]


@pytest.fixture
def prepared(tmp_path: Path) -> list[Prepared]:
    servers = []
    for name in "ab":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = tmp_path / f"{name}.log"
        command = shlex.join([sys.executable, str(PROGRAM), str(port), str(log)])
        servers.append(Prepared(name, f"http://127.0.0.1:{port}", command, log))
    return servers


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path) -> Iterator[None]:
    yield
    for process in psutil.process_iter(["cmdline"]):
        assert str(tmp_path) not in " ".join(process.info["cmdline"] or []), f"{process.pid} still runs"


def compare(folder: Path, servers: list[Prepared], *options: str) -> Session:
    arguments = [argument for server in servers for argument in server.arguments]
    assert main(["compare", *arguments, *SMALL, "--results", str(folder), "--rounds", "2", *options]) == 0
    (file,) = folder.glob("*.json")
    return load(file)


def test_compare_starts_servers_and_measures_their_start_and_memory(prepared, tmp_path) -> None:
    servers = [prepared[0], Prepared(**{**vars(prepared[1]), "command": prepared[1].command + " 0.5"})]
    session = compare(tmp_path, servers, "--starts", "2")
    quick, slow = (server.start_seconds for server in session.servers)
    assert [len(quick), len(slow)] == [2, 2]
    assert min(slow) >= 0.5
    for server, seconds in zip(servers, (quick, slow), strict=True):
        started, ready = server.times("started"), server.times("answered")
        assert ready[0] - started[0] <= seconds[0]
    for measurement in session.measurements:
        assert measurement.memory > 1_000_000
        assert measurement.resident_memory >= measurement.memory
    assert session.servers[1].command.endswith(" 0.5")
    assert session.servers[0].version == "1.2"


def test_frozen_servers_do_nothing_while_another_has_its_turn(prepared, tmp_path) -> None:
    compare(tmp_path, prepared, "--freeze-idle")
    spans = [list(zip(server.times("asked"), server.times("answered"), strict=True))[1:] for server in prepared]
    assert [len(own) for own in spans] == [4, 4]  # after the first answer, which timed the start
    for idle, busy in ((0, 1), (1, 0)):
        for word in ("alive", "child-alive"):
            beats = prepared[idle].times(word)
            assert any(beat < spans[busy][0][0] for beat in beats)
            for begin, end in spans[busy]:
                assert not [beat for beat in beats if begin < beat < end]


def test_one_at_a_time_starts_and_ends_each_server_in_every_round(prepared, tmp_path) -> None:
    session = compare(tmp_path, prepared, "--one-at-a-time")
    lives = []
    for server in prepared:
        lives += [(*life, server.name) for life in zip(server.times("started"), server.times("ended"), strict=True)]
    lives.sort()
    assert [name for *_, name in lives] == ["a", "b", "a", "b"]
    assert all(before[1] < after[0] for before, after in pairwise(lives))
    assert [len(server.start_seconds) for server in session.servers] == [2, 2]
    assert [(m.server, m.round) for m in session.measurements] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_a_server_that_ends_before_it_answers_says_why_and_the_others_are_ended(prepared, capsys) -> None:
    arguments = [*prepared[0].arguments, "--peer=bad=http://127.0.0.1:9"]
    command = "--peer-command=bad=echo no such weights >&2; exit 3"
    assert main(["compare", *arguments, command, *SMALL]) == 2
    printed = capsys.readouterr().err
    assert "bad ended with status 3" in printed
    assert "no such weights" in printed


def test_a_server_that_never_answers_is_given_up(prepared, capsys) -> None:
    arguments = ["--peer=mute=http://127.0.0.1:9", "--peer-command=mute=sleep 600", "--start-patience", "0.2"]
    assert main(["compare", *arguments, *SMALL]) == 2
    assert "no answer within 0.2 s" in capsys.readouterr().err


def test_the_answers_of_another_server_are_not_taken_for_those_of_the_one_started(serve, capsys) -> None:
    server = serve(lambda _, served: whole_answer(served))
    assert main(["compare", f"--peer=a={server.url}", "--peer-command=a=sleep 600", *SMALL]) == 2
    assert "listens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--peer-command", "b=true"], "no peer has that name"),
        (["--ours", "b"], "no peer has that name"),
        (["--one-at-a-time"], "--peer-command for a"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: list[str], words: str, capsys) -> None:
    assert main(["compare", "--peer", "a=http://127.0.0.1:9", *SMALL, *options]) == 2
    assert words in capsys.readouterr().err


def test_a_signal_to_the_comparison_ends_its_servers_too(prepared, tmp_path) -> None:
    arguments = [*prepared[0].arguments, "--freeze-idle", *SMALL, "--requests", "100000", "--results", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "loadtest", "compare", *arguments], stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 60
        while not prepared[0].log.exists() or len(prepared[0].times("asked")) < 3:
            assert running.poll() is None
            assert time.monotonic() < deadline, "it sent nothing"
            time.sleep(0.02)
        running.send_signal(signal.SIGTERM)
        _, printed = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "nothing was written" in printed
    assert not list(tmp_path.glob("*.json"))


def test_pausing_reaches_every_descendant_and_ending_works_on_the_paused(prepared) -> None:
    server = LaunchedServer("a", prepared[0].command)
    try:
        while len(tree_of(server.pid)) < 2 or not prepared[0].log.exists() or not prepared[0].times("child-alive"):
            time.sleep(0.01)
        pause(server.pid)
        while {process.status() for process in tree_of(server.pid)} != {psutil.STATUS_STOPPED}:
            time.sleep(0.01)
        resume(server.pid)
        while psutil.STATUS_STOPPED in {process.status() for process in tree_of(server.pid)}:
            time.sleep(0.01)
        pause(server.pid)
    finally:
        asyncio.run(server.stop())
    assert tree_of(server.pid) == []


def test_memory_counts_children_and_ends_with_the_process() -> None:
    alone = memory_of(os.getpid())
    assert alone.resident >= alone.held > 1_000_000
    command, pipes = [sys.executable, "-c", "print(flush=True); input()"], {"stdin": subprocess.PIPE}
    with subprocess.Popen(command, stdout=subprocess.PIPE, **pipes) as child:
        child.stdout.readline()  # a process that has not begun its program yet has a page of memory
        own = memory_of(child.pid)
        assert own.resident > 100_000
        assert memory_of(os.getpid()).resident > own.resident + alone.resident // 2
        child.communicate(b"\n")
    assert memory_of(child.pid) is None


def test_pages_of_a_file_count_once_in_a_tree_and_fully_in_each_of_two_trees(tmp_path) -> None:
    """A parent and its child map the same file, and so does a stranger."""
    size = 40_000_000
    file = tmp_path / "weights"
    file.write_bytes(bytes(size))
    code = (
        "import mmap, os, sys; pages = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, prot=mmap.PROT_READ);"
        "sys.argv[2] == '2' and os.fork(); sum(pages[::4096]); os.write(1, b'ready\\n'); os.read(0, 1)"
    )
    command, pipes = [sys.executable, "-c", code, str(file)], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen([*command, "2"], **pipes, start_new_session=True) as pair,
        subprocess.Popen([*command, "1"], **pipes) as stranger,
    ):
        for process in (pair, pair, stranger):
            assert process.stdout.readline() == b"ready\n"
        assert len(tree_of(pair.pid)) == 2
        two, one = memory_of(pair.pid), memory_of(stranger.pid)
        os.killpg(pair.pid, signal.SIGKILL)
        stranger.kill()
    assert size < one.held < 1.6 * size
    assert size < two.held < 1.6 * size
    assert two.resident > 2 * size


def test_keys_are_left_out_of_commands() -> None:
    command = "VLLM_API_KEY=k1 serve --api-key k2 --api-keys='k3' --set server.api_keys=k4 --port 1"
    kept = without_keys(command)
    assert not [key for key in ("k1", "k2", "k3", "k4") if key in kept]
    assert kept.endswith("--port 1")
