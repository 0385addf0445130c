"""The engine process dies, hangs and lies; the client's streams do not notice, or end as promised."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.client.client import EngineError, EngineState
from engine.config import SupervisionConfig
from engine.ipc.messages import EXIT_CODES
from engine.types import StepOutput
from tests.support import scripted_engine
from tests.support.scripted_client import (
    QUICK,
    Recorder,
    collect,
    make_client,
    make_request,
    process_state,
    read_one,
    running,
    tokens_of,
    until,
)
from tests.support.scripted_engine import EXIT, HANG, STALL, expected_tokens

PATIENT = SupervisionConfig(max_deaths=10)


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "peregrine"


@pytest.mark.parametrize("num_kills", [1, 3])
async def test_streams_go_on_after_kill_9_with_the_tokens_they_would_have_had(num_kills: int) -> None:
    observer, chance = Recorder(), random.Random(num_kills)
    requests = [make_request(f"r{i}", max_tokens=200, num_prompt_tokens=1 + i) for i in range(32)]
    received: list[list[StepOutput]] = [[] for _ in requests]

    async def stream(index: int) -> None:
        async for output in read_one(client, requests[index]):
            received[index].append(output)

    async with running("delay=0.005", observer=observer, supervision=PATIENT) as client:
        streams = [asyncio.create_task(stream(index)) for index in range(32)]
        for num_deaths in range(1, 1 + num_kills):
            await until_all_moved(streams, received)
            await asyncio.sleep(0.05 * chance.random())
            os.kill(client.pid, signal.SIGKILL)
            await until_died(observer, num_deaths)
            assert client.state is EngineState.RESTARTING
        await asyncio.gather(*streams)
        assert client.num_restarts == len(observer.deaths) == len(observer.replays) == num_kills
        assert (client.num_waiting, client.num_waiting_tokens, client.num_running) == (0, 0, 0)
    for request, outputs in zip(requests, received, strict=True):
        assert tokens_of(outputs) == expected_tokens(request)
        assert [output.finish_reason for output in outputs if output.finish_reason] == ["length"]
    assert sorted(observer.started) == sorted(request.request_id for request in requests)
    assert "SIGKILL" in observer.deaths[0]


async def until_all_moved(streams: list[asyncio.Task], received: list[list[StepOutput]]) -> None:
    """Every request made progress since now: none is a suspect any more, whatever was before."""
    lengths = [len(outputs) for outputs in received]
    await until(
        lambda: all(
            task.done() or len(outputs) > length
            for task, outputs, length in zip(streams, received, lengths, strict=True)
        )
    )


async def until_died(observer: SimpleNamespace, num_deaths: int) -> None:
    await until(lambda: len(observer.deaths) == num_deaths)


async def test_prompt_logprobs_are_delivered_once_though_the_prompt_is_scored_twice() -> None:
    async with running("delay=0.01") as client:
        request = make_request("r", num_prompt_tokens=200, prompt_logprobs=0, max_tokens=5)
        stream = asyncio.create_task(collect(client, request))
        await until(lambda: client.num_running == 1)
        await asyncio.sleep(0.05)
        os.kill(client.pid, signal.SIGKILL)
        outputs = await stream
        assert [entry for output in outputs for entry in output.prompt_logprobs or []] == (
            scripted_engine.expected_prompt_logprobs(request)
        )
        assert tokens_of(outputs) == expected_tokens(request)


@pytest.mark.parametrize("order", ["CRASH_WHEN_FRESH", "GARBAGE", "FORK"])
async def test_a_process_that_ends_in_a_strange_way_is_replaced(order: str) -> None:
    observer = Recorder()
    async with running(observer=observer) as client:
        strange = make_request("strange", order=getattr(scripted_engine, order))
        requests = [strange, *(make_request(f"r{i}") for i in range(5))]
        results = await asyncio.gather(*(collect(client, request) for request in requests))
        assert [tokens_of(outputs) for outputs in results] == [expected_tokens(r) for r in requests]
        assert client.num_restarts == 1
    expected = "a frame of" if order == "GARBAGE" else "exit code 7"
    assert expected in observer.deaths[0]


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("EXIT", "exit code 7"),
        ("SEGFAULT", "SIGSEGV"),
        ("RAISE", "RuntimeError: the step failed on order (scripted_engine.py:"),
        ("HANG", "a step of the engine took longer than 1 s"),
    ],
)
async def test_a_request_that_kills_the_engine_twice_in_steps_of_its_own_is_quarantined_alone(
    order: str, reason: str
) -> None:
    observer = Recorder()
    limits = replace(QUICK, step=1.0, heartbeat_interval=0.1)
    async with running("delay=0.005", observer=observer, limits=limits) as client:
        good = [make_request(f"r{i}", max_tokens=60) for i in range(10)]
        streams = [asyncio.create_task(collect(client, request)) for request in good]
        await until(lambda: client.num_running == 10)
        bad = make_request("bad", order=getattr(scripted_engine, order))
        with pytest.raises(EngineError, match="request bad") as quarantined:
            await collect(client, bad)
        assert quarantined.value.kind == "quarantined"
        results = await asyncio.gather(*streams)
        assert [tokens_of(outputs) for outputs in results] == [expected_tokens(request) for request in good]
        assert client.num_restarts == 3  # the first was in a batch
        assert all(reason in death for death in observer.deaths)


async def kill_as_soon_as_ready(client: SimpleNamespace, *, after: int | None) -> int:
    """Kills the process that follows `after`, in the moment it says that it is ready. Returns its pid."""
    deadline = time.monotonic() + 30
    while client.pid in (None, after) or client.state is not EngineState.READY:
        assert time.monotonic() < deadline
        await asyncio.sleep(0)
    pid = client.pid
    os.kill(pid, signal.SIGKILL)
    return pid


@pytest.mark.parametrize("num_streams", [1, 2, 32])
async def test_a_second_kill_just_as_the_replacement_becomes_ready_ends_no_stream(num_streams: int) -> None:
    async with running("delay=0.005") as client:
        requests = [make_request(f"r{i}", max_tokens=150) for i in range(num_streams)]
        streams = [asyncio.create_task(collect(client, request)) for request in requests]
        await until(lambda: client.num_running == num_streams)
        first = client.pid
        os.kill(first, signal.SIGKILL)
        await kill_as_soon_as_ready(client, after=first)
        results = await asyncio.gather(*streams)
        assert [tokens_of(outputs) for outputs in results] == [expected_tokens(r) for r in requests]
        assert client.num_restarts == 2


async def test_kills_of_processes_that_have_computed_nothing_do_not_count() -> None:
    observer = Recorder()
    async with running(observer=observer, supervision=SupervisionConfig(max_deaths=1)) as client:
        pid = None
        for num_deaths in range(1, 5):
            pid = await kill_as_soon_as_ready(client, after=pid)
            await until_died(observer, num_deaths)
        request = make_request("r")
        assert tokens_of(await collect(client, request)) == expected_tokens(request)
        assert client.num_restarts == 4


@pytest.mark.parametrize("num_poisoned", [1, 3])
async def test_requests_live_through_every_death_that_poisoned_ones_beside_them_cause(num_poisoned: int) -> None:
    observer = Recorder()
    async with running("delay=0.005", observer=observer) as client:
        good = [make_request(f"r{i}", max_tokens=60) for i in range(31)]
        streams = [asyncio.create_task(collect(client, request)) for request in good]
        await until(lambda: client.num_running == 31)
        for _ in range(2):  # more deaths than `max_deaths`, each explained
            bad = [make_request(f"bad{i}", order=EXIT) for i in range(num_poisoned)]
            errors = await asyncio.gather(*(collect(client, request) for request in bad), return_exceptions=True)
            assert [error.kind for error in errors] == ["quarantined"] * num_poisoned
        results = await asyncio.gather(*streams)
        assert [tokens_of(outputs) for outputs in results] == [expected_tokens(request) for request in good]
        assert len(observer.deaths) == client.num_restarts >= 2 * (1 + 2 * num_poisoned)


@pytest.mark.parametrize("leaves_in_the_step", [False, True])
async def test_clients_that_leave_a_poisoned_request_behind_cannot_end_the_server(leaves_in_the_step: bool) -> None:
    observer = Recorder()
    limits = replace(QUICK, step=0.5, heartbeat_interval=0.1)
    async with running("delay=0.005", observer=observer, limits=limits) as client:
        good = make_request("good", max_tokens=4000)
        stream = asyncio.create_task(collect(client, good))
        for num_deaths in range(1, 5):
            await until(lambda: client.num_running == 1)
            bad = make_request(f"bad{num_deaths}", order=HANG if leaves_in_the_step else EXIT)
            leaver = asyncio.create_task(collect(client, bad))
            if leaves_in_the_step:
                await asyncio.sleep(0.1)
            else:
                await until_died(observer, num_deaths)
            leaver.cancel()
            await until_died(observer, num_deaths)
        assert not client.failed.is_set()
        assert tokens_of(await stream) == expected_tokens(good)


@pytest.mark.parametrize("max_deaths", [1, 2])
async def test_the_server_gives_up_at_as_many_deaths_as_the_operator_allows(max_deaths: int) -> None:
    observer = Recorder()
    async with running(observer=observer, supervision=SupervisionConfig(max_deaths=max_deaths)) as client:
        for num_deaths in range(1, max_deaths + 1):
            assert not client.failed.is_set()
            request = make_request(f"r{num_deaths}")
            assert tokens_of(await collect(client, request)) == expected_tokens(request)
            os.kill(client.pid, signal.SIGKILL)
            await until_died(observer, num_deaths)
        await asyncio.wait_for(client.failed.wait(), 5)
        assert client.failure is not None
        assert f"died {max_deaths} times within 300 s (supervision.max_deaths)" in client.failure.message


async def test_a_step_that_takes_long_on_this_machine_is_no_hang_and_a_hang_is_found_there_too() -> None:
    observer = Recorder()
    limits = replace(QUICK, step=0.2, heartbeat_interval=0.05)
    machine = "delay=0.5&num_parameters=1e6&flops_per_second=2e8"  # at best 0.08 s for a step of 8 tokens
    async with running(machine, observer=observer, limits=limits) as client:
        slow = make_request("slow", max_tokens=4)
        assert tokens_of(await collect(client, slow)) == expected_tokens(slow)
        assert observer.deaths == []
        with pytest.raises(EngineError, match="request bad"):
            await collect(client, make_request("bad", order=HANG, num_prompt_tokens=1, max_tokens=1))
        assert all("a step of the engine took longer than" in death for death in observer.deaths)


async def test_a_stopped_process_is_noticed_killed_and_replaced() -> None:
    observer = Recorder()
    limits = replace(QUICK, silence=0.8)
    async with running("delay=0.005", observer=observer, limits=limits) as client:
        request = make_request("r", max_tokens=300)
        stream = asyncio.create_task(collect(client, request))
        await until(lambda: client.num_running == 1)
        pid = client.pid
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: client.state is EngineState.RESTARTING, seconds=4)
        assert tokens_of(await stream) == expected_tokens(request)
        assert process_state(pid) == ""
        assert observer.deaths == ["the engine process gave no sign of life for 0.8 s"]


async def test_an_engine_that_takes_steps_and_computes_nothing_is_replaced() -> None:
    observer = Recorder()
    limits = replace(QUICK, step=0.5, silence=0.5, heartbeat_interval=0.1)
    async with running("delay=0.005", observer=observer, limits=limits) as client:
        requests = [make_request("stalls", order=STALL), *(make_request(f"r{i}") for i in range(5))]
        results = await asyncio.gather(*(collect(client, request) for request in requests))
        assert [tokens_of(outputs) for outputs in results] == [expected_tokens(r) for r in requests]
        await asyncio.sleep(1.2)  # without requests, nothing has to be computed
        assert client.num_restarts == 1
    assert "though it has requests" in observer.deaths[0]


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """The soft limit of this process, for the time of the test: what is open now, and a few more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(int(name) for name in os.listdir("/proc/self/fd")) + 60
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def all_descriptors_taken() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            while True:
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield


@pytest.mark.usefixtures("few_descriptors")
async def test_the_engine_comes_back_where_connections_have_taken_every_file_descriptor() -> None:
    async with running("delay=0.005", supervision=PATIENT) as client:
        for number in range(3):
            request = make_request(f"r{number}", max_tokens=200)
            stream = asyncio.create_task(collect(client, request))
            await until(lambda: client.num_running == 1)
            with all_descriptors_taken():
                os.kill(client.pid, signal.SIGKILL)
                assert tokens_of(await stream) == expected_tokens(request)
        assert client.num_restarts == 3


async def test_a_process_that_cannot_be_started_now_is_started_later(few_descriptors: int) -> None:
    async with running("delay=0.005") as client:
        request = make_request("r", max_tokens=200)
        stream = asyncio.create_task(collect(client, request))
        await until(lambda: client.num_running == 1)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: "Too many open files" in client.phase_detail)
        resource.setrlimit(resource.RLIMIT_NOFILE, (few_descriptors, hard))
        assert tokens_of(await stream) == expected_tokens(request)
        assert client.state is EngineState.READY


async def test_a_pause_of_the_server_itself_is_not_blamed_on_the_engine() -> None:
    limits = replace(QUICK, silence=1.5, heartbeat_interval=0.1)
    async with running(limits=limits) as client:
        pid = client.pid
        os.kill(pid, signal.SIGSTOP)  # with the server, as Ctrl-Z in a terminal does to a whole job
        await asyncio.sleep(0.3)
        time.sleep(1.6)  # noqa: ASYNC251 (the loop stands still)
        await asyncio.sleep(0.2)
        os.kill(pid, signal.SIGCONT)
        request = make_request("r")
        assert tokens_of(await collect(client, request)) == expected_tokens(request)
        assert (client.pid, client.num_restarts) == (pid, 0)


async def test_unexplained_deaths_fail_every_request_and_leave_a_report_without_contents(state_directory: Path) -> None:
    observer = Recorder()
    async with running("delay=0.01", observer=observer) as client:
        request = make_request("r", max_tokens=4000)
        stream = asyncio.create_task(collect(client, request))
        waiting = asyncio.create_task(client.failed.wait())
        for num_deaths in (1, 2, 3):
            await until(lambda: client.num_running == 1)
            await asyncio.sleep(0.05)  # progress, so that it is no suspect
            os.kill(client.pid, signal.SIGKILL)
            await until_died(observer, num_deaths)
        await asyncio.wait_for(waiting, 5)
        with pytest.raises(EngineError, match="will not come back") as failed:
            await stream
        assert failed.value.kind == "engine_failed"
        with pytest.raises(EngineError, match="will not come back"):
            await collect(client, make_request("late"))
        assert (client.state, client.num_running, client.num_waiting) == (EngineState.FAILED, 0, 0)
        assert client.failure is not None
        assert EXIT_CODES[client.failure.kind] == 5
        (path,) = files_in(state_directory)
        assert client.failure.message.endswith(str(path))
    text = read(path)
    report = json.loads(text)
    assert [death["exit_code"] for death in report["deaths"]] == [-9, -9, -9]
    assert {"python", "msgspec"} <= set(report["versions"])
    assert any(death["batch"] for death in report["deaths"])
    assert all(line[0] == "r" and len(line) == 4 for death in report["deaths"] for line in death["batch"])
    assert "token_ids" not in text


def files_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def read(path: Path) -> str:
    return path.read_text()


async def test_deaths_far_apart_do_not_add_up() -> None:
    async with running(supervision=SupervisionConfig(window=0.001)) as client:
        for i in range(4):
            os.kill(client.pid, signal.SIGKILL)
            request = make_request(f"r{i}")
            assert tokens_of(await collect(client, request)) == expected_tokens(request)
        assert client.num_restarts == 4


async def test_requests_that_come_and_go_while_the_engine_is_away_are_forgotten_or_served() -> None:
    observer = Recorder()
    limits = replace(QUICK, first_backoff=0.3)
    async with running("delay=0.005", observer=observer, limits=limits) as client:
        stays, leaves = make_request("stays", max_tokens=200), make_request("leaves", max_tokens=200)
        streams = [asyncio.create_task(collect(client, request)) for request in (stays, leaves)]
        await until(lambda: client.num_running == 2)
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: client.state is EngineState.RESTARTING)
        assert (client.num_waiting, client.num_running) == (2, 0)
        streams[1].cancel()
        comes = make_request("comes")
        assert tokens_of(await collect(client, comes)) == expected_tokens(comes)
        assert tokens_of(await streams[0]) == expected_tokens(stays)
        await until(lambda: observer.steps[-1].num_running == 0)
        assert (client.num_waiting, client.num_running) == (0, 0)


async def test_aborts_and_crashes_together_leave_nothing_behind() -> None:
    observer, chance = Recorder(), random.Random(2)
    async with running("max_num_seqs=16", observer=observer, supervision=PATIENT) as client:

        async def one(i: int) -> None:
            request = make_request(f"r{i}", max_tokens=80)
            leaves = chance.random() < 0.5
            await asyncio.sleep(chance.random())
            received: list[int] = []
            async with aclosing(read_one(client, request)) as outputs:
                async for output in outputs:
                    received += output.token_ids
                    if leaves and chance.random() < 0.2:
                        break
            assert received == expected_tokens(request)[: len(received) if leaves else None]

        everybody = asyncio.gather(*(one(i) for i in range(200)), return_exceptions=True)
        for _ in range(3):
            await asyncio.sleep(0.25)
            await until(lambda: client.state is EngineState.READY)
            os.kill(client.pid, signal.SIGKILL)
        errors = [error for error in await everybody if error is not None]
        assert all(isinstance(error, EngineError) and error.kind == "quarantined" for error in errors)
        assert len(errors) <= 2  # each crash but the first may have hit the one suspect that was being replayed
        await until(lambda: client.state is EngineState.READY)
        assert (client.num_waiting, client.num_waiting_tokens, client.num_running) == (0, 0, 0)
        request = make_request("after")
        assert tokens_of(await collect(client, request)) == expected_tokens(request)
        assert (observer.steps[-1].num_running, observer.steps[-1].num_waiting) == (0, 0)


@pytest.mark.parametrize(
    ("order", "kind", "message"),
    [
        ("config", "config", "set a lower scheduler.max_num_seqs"),
        ("model", "model", "no such model; give a path"),
        ("memory", "memory", "needs 9 GiB, has 1 GiB"),
        ("memory_error", "memory", "no more"),
        ("torch_memory", "memory", "can't allocate memory"),
        ("chained", "internal", "RuntimeError: the outer error; because of KeyError: 'the root cause' (scripted_eng"),
        ("exit", "internal", "exit code 9 while it started; its last output was:\n  the last line of output"),
        ("kill", "internal", "SIGKILL, as the kernel's out-of-memory killer does"),
    ],
)
async def test_a_failed_start_says_why_and_is_not_repeated(order: str, kind: str, message: str) -> None:
    observer = Recorder()
    client = make_client(f"fail={order}", observer=observer)
    await client.start()
    stream = asyncio.create_task(collect(client, make_request("r")))
    await asyncio.wait_for(client.failed.wait(), 20)
    with pytest.raises(EngineError):
        await stream
    assert client.failure is not None
    assert client.failure.kind == kind
    assert message in client.failure.message
    assert (client.state, client.num_restarts, observer.deaths) == (EngineState.FAILED, 0, [])
    await client.stop()
    assert client.state is EngineState.FAILED


async def test_a_start_that_gives_no_sign_of_life_fails() -> None:
    client = make_client(limits=replace(QUICK, starting_silence=1.0))
    await client.start()
    await until(lambda: client.pid is not None)
    os.kill(client.pid, signal.SIGSTOP)
    await asyncio.wait_for(client.failed.wait(), 20)
    assert client.failure is not None
    assert "no sign of life for 1 s while it started" in client.failure.message
    await client.stop()
