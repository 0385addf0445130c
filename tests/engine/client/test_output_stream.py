"""Several requests that one reader has, with a real engine process."""

from __future__ import annotations

from collections import defaultdict

import pytest

from engine.client.client import EngineError, OutputStream
from tests.support import scripted_engine
from tests.support.scripted_client import Recorder, collect, make_request, running, tokens_of, until
from tests.support.scripted_engine import expected_tokens


async def test_a_step_of_several_requests_is_taken_at_once() -> None:
    requests = [make_request(f"r{i}", max_tokens=60) for i in range(4)]
    tokens: dict[str, list[int]] = defaultdict(list)
    takes: list[list[str]] = []
    async with running("delay=0.002") as client:
        with client.generate(requests) as outputs:
            num_open = len(requests)
            while num_open:
                taken = await outputs.take(num_open)
                if num_open == len(requests):
                    takes.append(sorted(output.request_id for output in taken))
                for output in taken:
                    tokens[output.request_id] += output.token_ids
                    num_open -= output.finish_reason is not None
        assert (client.num_waiting, client.num_running) == (0, 0)
    names = sorted(request.request_id for request in requests)
    together = takes[takes.index(names) :]  # they may have begun in different steps
    assert len(together) > 10
    assert all(taken == names for taken in together)
    assert tokens == {request.request_id: expected_tokens(request) for request in requests}


async def test_leaving_one_request_aborts_it_alone() -> None:
    observer = Recorder()
    stays, left = make_request("stays", max_tokens=50), make_request("left", max_tokens=10**6)
    received = []
    async with running("delay=0.001", observer=observer) as client:
        with client.generate([stays, left]) as outputs:
            while not received or received[-1].finish_reason is None:
                for output in await outputs.take(2):
                    if output.request_id == "stays":
                        received.append(output)
                    else:
                        outputs.leave("left")
        await until(lambda: observer.steps[-1].num_running == observer.steps[-1].num_waiting == 0)
        assert (client.num_waiting, client.num_running) == (0, 0)
    assert tokens_of(received) == expected_tokens(stays)


async def test_leaving_the_stream_aborts_all_that_have_not_ended() -> None:
    observer = Recorder()
    async with running("delay=0.001", observer=observer) as client:
        with client.generate([make_request(f"r{i}", max_tokens=10**6) for i in range(5)]) as outputs:
            await outputs.take(5)
            await until(lambda: client.num_running == 5)
        assert (client.num_waiting, client.num_running) == (0, 0)
        await until(lambda: observer.steps[-1].num_running == observer.steps[-1].num_waiting == 0)
        other = make_request("r0")
        assert tokens_of(await collect(client, other)) == expected_tokens(other)


async def test_a_request_that_fails_ends_its_stream_once_and_no_other() -> None:
    requests = [make_request("good", max_tokens=10**6), make_request("bad", order=scripted_engine.REFUSED)]

    async def read_on(outputs: OutputStream) -> None:
        while True:
            assert {output.request_id for output in await outputs.take(2)} == {"good"}

    async with running() as client:
        with client.generate(requests) as outputs:
            with pytest.raises(EngineError, match="cannot fit"):
                await read_on(outputs)
            with pytest.raises(EngineError, match="cannot fit"):
                await outputs.take(2)
            other = make_request("other")
            assert tokens_of(await collect(client, other)) == expected_tokens(other)
        assert (client.num_waiting, client.num_running) == (0, 0)


async def test_a_stream_of_which_one_id_is_in_use_sends_none() -> None:
    async with running("delay=0.01") as client:
        with client.generate([make_request("used", max_tokens=10**6)]):
            with (
                pytest.raises(ValueError, match="used"),
                client.generate([make_request("new"), make_request("used"), make_request("newer")]),
            ):
                pytest.fail("it was entered")
            assert client.num_waiting + client.num_running == 1
        assert client.num_waiting + client.num_running == 0
