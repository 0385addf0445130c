"""The client and a real engine process that behaves: streams, aborts, starting, stopping."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest
import uvloop

from engine.client.client import EngineClient, EngineError, EngineState
from engine.client.engine_process import launch_child
from tests import ROOT
from tests.support import scripted_engine
from tests.support.scripted_client import (
    FACTORY,
    QUICK,
    Recorder,
    SupervisionLimits,
    collect,
    make_client,
    make_config,
    make_request,
    process_state,
    read_one,
    running,
    tokens_of,
    until,
)
from tests.support.scripted_engine import expected_tokens


async def test_requests_get_their_tokens_and_one_end_each() -> None:
    observer = Recorder()
    async with running(observer=observer) as client:
        requests = [make_request(f"r{i}", max_tokens=1 + i, num_prompt_tokens=1 + 3 * i) for i in range(12)]
        results = await asyncio.gather(*(collect(client, request) for request in requests))
        assert (client.num_waiting, client.num_waiting_tokens, client.num_running) == (0, 0, 0)
    for request, outputs in zip(requests, results, strict=True):
        assert tokens_of(outputs) == expected_tokens(request)
        assert [output.finish_reason for output in outputs if output.finish_reason] == ["length"]
        assert outputs[-1].finish_reason == "length"
    assert sorted(observer.started) == sorted(request.request_id for request in requests)
    assert observer.phases[0] == ("weights", "half of them")
    assert [model.architecture for model in observer.models] == ["Scripted"]
    assert (observer.deaths, observer.replays) == ([], [])


async def test_a_request_made_before_the_engine_is_ready_waits_for_it() -> None:
    client = make_client()
    request = make_request("early")
    stream = asyncio.create_task(collect(client, request))
    await asyncio.sleep(0)
    assert (client.state, client.num_waiting, client.num_waiting_tokens) == (EngineState.STARTING, 1, 12)
    await client.start()
    assert tokens_of(await stream) == expected_tokens(request)
    assert (client.state, client.phase) == (EngineState.READY, "ready")
    assert client.model is not None
    await client.stop()


async def test_a_process_launched_ahead_is_the_first_that_runs_and_another_follows_it() -> None:
    launched = launch_child(FACTORY, heartbeat_interval=0.2)
    limits, request = QUICK, make_request("r")
    client = EngineClient(
        make_config(),
        Recorder(),
        limits=limits,
        factory=FACTORY,
        first_child=launched,
    )
    await client.start()
    assert tokens_of(await collect(client, request)) == expected_tokens(request)
    assert client.pid == launched.process.pid
    launched.discard()  # too late: it is the client's
    os.kill(launched.process.pid, signal.SIGKILL)
    await until(lambda: client.num_restarts == 1 and client.state is EngineState.READY)
    assert client.pid != launched.process.pid
    await client.stop()


async def test_a_process_launched_ahead_imports_before_anybody_speaks_to_it_and_can_be_ended(tmp_path: Path) -> None:
    place, imported = tmp_path / "slow.py", tmp_path / "imported"
    place.write_text(f"from pathlib import Path\nPath({str(imported)!r}).touch()\ndef build(config, report): ...\n")
    launched = launch_child(f"{place}:build", heartbeat_interval=0.2)
    await until(imported.exists)
    launched.discard()
    assert not process_state(launched.process.pid)


async def test_background_requests_that_wait_are_counted_by_themselves_too() -> None:
    client = make_client()
    requests = [make_request("somebody"), msgspec.structs.replace(make_request("line"), is_background=True)]
    streams = [asyncio.create_task(collect(client, request)) for request in requests]
    await asyncio.sleep(0)
    assert (client.num_waiting, client.num_waiting_tokens) == (2, 24)
    assert (client.num_background_waiting, client.num_background_waiting_tokens) == (1, 12)
    await client.start()
    await asyncio.gather(*streams)
    assert (client.num_background_waiting, client.num_background_waiting_tokens) == (0, 0)


async def test_the_counters_follow_a_request_from_the_queue_to_its_end() -> None:
    async with running("max_num_seqs=1&delay=0.005") as client:
        first, second = make_request("first", max_tokens=60), make_request("second", num_prompt_tokens=7)
        streams = [asyncio.create_task(collect(client, request)) for request in (first, second)]
        await until(lambda: client.num_running == 1)
        assert (client.num_waiting, client.num_waiting_tokens) == (1, 7)
        await asyncio.gather(*streams)
        assert (client.num_waiting, client.num_waiting_tokens, client.num_running) == (0, 0, 0)


async def test_an_id_that_is_in_use_is_refused_and_may_be_used_again_after() -> None:
    async with running("delay=0.01") as client:
        request = make_request("same", max_tokens=20)
        stream = asyncio.create_task(collect(client, request))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="same"):
            await collect(client, request)
        assert tokens_of(await stream) == expected_tokens(request)
        assert tokens_of(await collect(client, request)) == expected_tokens(request)


async def test_an_id_that_was_left_may_be_used_again_at_once_for_other_tokens() -> None:
    async with running("delay=0.001") as client:
        for i in range(60):
            left = make_request("same", num_prompt_tokens=2, max_tokens=50)
            async with aclosing(read_one(client, left)) as outputs:
                async for _ in outputs:
                    break
            request = make_request("same", num_prompt_tokens=3 + i % 4, max_tokens=4)
            assert tokens_of(await collect(client, request)) == expected_tokens(request)


async def test_a_poisoned_request_fails_alone() -> None:
    async with running() as client:
        good = [make_request(f"good{i}") for i in range(4)]
        orders = {"poisoned": scripted_engine.POISONED, "refused": scripted_engine.REFUSED}
        bad = [make_request(name, order=order) for name, order in orders.items()]
        results = await asyncio.gather(*(collect(client, r) for r in good + bad), return_exceptions=True)
        assert [tokens_of(outputs) for outputs in results[:4]] == [expected_tokens(r) for r in good]
        assert [(str(error), error.kind) for error in results[4:]] == [
            ("the logits are not finite", "request"),
            ("the request cannot fit", "request"),
        ]
        assert client.num_restarts == 0


async def leave_somewhere(client: EngineClient, name: str, chance: random.Random) -> None:
    """Leaves a request at a random point: never sent, queued, in its prompt, decoding, or after its end."""
    num_outputs = chance.choice([0, 0, 1, 2, 5, None])
    max_tokens = 10**6 if num_outputs is not None else 20  # only an abort ends what is left early
    request = make_request(name, num_prompt_tokens=chance.randint(1, 40), max_tokens=max_tokens)
    if num_outputs == 0:
        task = asyncio.create_task(collect(client, request))
        await asyncio.sleep(chance.random() * 0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return
    async with aclosing(read_one(client, request)) as outputs:
        received = 0
        async for _ in outputs:
            received += 1
            if received == num_outputs:
                break


async def test_a_storm_of_aborts_leaves_the_engine_empty() -> None:
    observer, chance = Recorder(), random.Random(11)
    async with running("max_num_seqs=40&delay=0", observer=observer) as client:
        for _ in range(4):
            await asyncio.gather(*(leave_somewhere(client, f"r{i}", chance) for i in range(250)))
        assert (client.num_waiting, client.num_running) == (0, 0)
        await until(lambda: observer.steps[-1].num_running == observer.steps[-1].num_waiting == 0)
        assert observer.steps[-1].num_owned_blocks == 0
        num_steps = len(observer.steps)
        await asyncio.sleep(0.1)
        assert len(observer.steps) == num_steps  # it works on nothing
        request = make_request("after")
        assert tokens_of(await collect(client, request)) == expected_tokens(request)
        assert client.num_restarts == 0


async def test_a_consumer_that_does_not_read_holds_up_nobody() -> None:
    async with running("delay=0") as client:
        slow = make_request("slow", max_tokens=3000)
        async with aclosing(read_one(client, slow)) as outputs:
            received = [await anext(outputs)]
            others = [make_request(f"r{i}") for i in range(8)]
            results = await asyncio.gather(*(collect(client, request) for request in others))
            assert [tokens_of(r) for r in results] == [expected_tokens(request) for request in others]
            received += [output async for output in outputs]
        assert tokens_of(received) == expected_tokens(slow)


async def test_stopping_ends_the_requests_and_the_process() -> None:
    async with running("delay=0.01") as client:
        pid = client.pid
        streams = [asyncio.create_task(collect(client, make_request(f"r{i}", max_tokens=3000))) for i in range(3)]
        await until(lambda: client.num_running == 3)
        await client.stop()
        errors = await asyncio.gather(*streams, return_exceptions=True)
        assert [error.kind for error in errors] == ["stopped"] * 3
        assert (client.state, client.pid, process_state(pid)) == (EngineState.STOPPED, None, "")
        with pytest.raises(EngineError) as refused:
            await collect(client, make_request("late"))
        assert refused.value.kind == "stopped"
        assert not client.failed.is_set()


async def test_stopping_does_not_wait_for_a_start_that_hangs_nor_for_a_stopped_process() -> None:
    client = make_client("fail=hang")
    await client.start()
    await until(lambda: client.phase == "weights")
    pid = client.pid
    await asyncio.wait_for(client.stop(), 4)
    assert process_state(pid) == ""

    limits = SupervisionLimits(stop_grace=0.2)
    async with running(limits=limits) as client:
        pid = client.pid
        os.kill(pid, signal.SIGSTOP)
        await asyncio.wait_for(client.stop(), 4)
        assert process_state(pid) == ""


async def test_no_file_descriptor_is_left_after_a_life_and_a_crash() -> None:
    async with running():
        pass  # the loop's own descriptors are open from now on
    num_before = len(os.listdir("/proc/self/fd"))
    async with running() as client:
        os.kill(client.pid, signal.SIGKILL)
        request = make_request("r")
        assert tokens_of(await collect(client, request)) == expected_tokens(request)
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= num_before


async def test_the_engine_process_ignores_the_signals_of_a_terminal() -> None:
    async with running() as client:
        pid = client.pid
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        request = make_request("r")
        assert tokens_of(await collect(client, request)) == expected_tokens(request)
        assert (client.pid, client.num_restarts) == (pid, 0)
        assert os.getpgid(pid) != os.getpgid(0)


def test_the_client_runs_on_uvloop_through_a_crash() -> None:
    async def live() -> None:
        async with running("delay=0.005") as client:
            requests = [make_request(f"r{i}", max_tokens=100) for i in range(4)]
            streams = [asyncio.create_task(collect(client, request)) for request in requests]
            await until(lambda: client.num_running == 4)
            os.kill(client.pid, signal.SIGKILL)
            for request, outputs in zip(requests, await asyncio.gather(*streams), strict=True):
                assert tokens_of(outputs) == expected_tokens(request)
            assert client.num_restarts == 1

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(live())


def test_the_client_loads_without_torch() -> None:
    code = "import engine.client, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
