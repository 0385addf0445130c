"""The queue's limits over HTTP, for requests that arrive in the same instant, and what clients make of a refusal."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from typing import Self

import httpx
import openai
import pytest

from engine.types import Request, StepOutput
from server.config import Config
from server.generation.admission import Admission, DrainRate
from tests.support.fake_engine import FakeStream
from tests.support.server_world import connect

PATH = "/v1/completions"
BODY = {"model": "tiny", "prompt": "hello world", "max_tokens": 2}  # two tokens


class Queue:
    """A world whose engine runs so many requests at a time; the others wait in the queue that the real rules guard."""

    def __init__(self, world, *, num_workers: int, **limits: int) -> None:
        world.configure({"limits": limits})
        self.world, self.engine = world, world.engine
        self.slots = asyncio.Semaphore(num_workers)
        self.most_waiting = self.most_waiting_tokens = self.num_refused = 0
        self.drain_rate = DrainRate()
        self.admission = Admission(self.engine, Config.model_validate({"limits": limits}).limits, self.drain_rate)
        world.state.admission = self.admission
        self.waiting: dict[str, int] = {}  # by request id: the prompt's tokens
        self.answer = self.engine.answer
        self.engine.answer = self.answer_in_turn
        self.engine.generate = lambda requests: QueuedStream(self, requests)

    def wait(self, request: Request) -> None:
        self.waiting[request.request_id] = len(request.prompt_token_ids)
        self._count()
        self.most_waiting = max(self.most_waiting, self.engine.num_waiting)
        self.most_waiting_tokens = max(self.most_waiting_tokens, self.engine.num_waiting_tokens)

    def stop_waiting(self, request_id: str) -> None:
        self.waiting.pop(request_id, None)
        self._count()

    def _count(self) -> None:
        self.engine.num_waiting, self.engine.num_waiting_tokens = len(self.waiting), sum(self.waiting.values())

    async def answer_in_turn(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        async with self.slots:
            self.stop_waiting(request.request_id)
            async for output in self.answer(request):
                yield output


class QueuedStream(FakeStream):
    """Its requests wait from the moment in which they are sent, as those of the real client do."""

    def __init__(self, queue: Queue, requests: Sequence[Request]) -> None:
        super().__init__(queue.engine, requests)
        self._queue = queue

    def __enter__(self) -> Self:
        for request in self._requests:
            self._queue.wait(request)
        return super().__enter__()

    def leave(self, request_id: str) -> None:
        super().leave(request_id)
        self._queue.stop_waiting(request_id)


async def settle(tasks: list[asyncio.Task[httpx.Response]], num_done: int) -> list[httpx.Response]:
    """The answers that are there once so many are; the others wait."""
    first = [await task for task in itertools.islice(asyncio.as_completed(tasks), num_done)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert sum(task.done() for task in tasks) == num_done
    return first


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("limits", "fields", "num_admitted"),
    [
        ({"max_queued_requests": 2}, {}, 2),
        ({"max_queued_requests": 6}, {"n": 2}, 3),
        ({"max_queued_requests": 6}, {"prompt": ["a", "b"], "n": 2}, 1),
        ({"max_queued_tokens": 7}, {}, 3),
        ({"max_queued_tokens": 7}, {"n": 2}, 1),
    ],
)
async def test_of_sixteen_that_come_at_once_as_many_wait_as_may(
    world, stream: bool, limits: dict, fields: dict, num_admitted: int
) -> None:
    queue = Queue(world, num_workers=0, **limits)
    async with connect(world) as client:
        posts = [client.post(PATH, json=BODY | fields | {"stream": stream}) for _ in range(16)]
        tasks = [asyncio.ensure_future(post) for post in posts]
        refused = await settle(tasks, 16 - num_admitted)
        assert [response.status_code for response in refused] == [429] * (16 - num_admitted)
        assert len({response.headers["retry-after-ms"] for response in refused}) == len(refused)
        assert all(0 < float(response.headers["retry-after-ms"]) <= 60_000 for response in refused)
        for _ in range(64):
            queue.slots.release()
        answers = await asyncio.gather(*tasks)
        assert sum(response.status_code == 200 for response in answers) == num_admitted
    assert queue.most_waiting <= limits.get("max_queued_requests", 1024)
    assert queue.most_waiting_tokens <= limits.get("max_queued_tokens", 1024)
    assert (queue.admission.num_waiting, queue.admission.num_waiting_tokens) == (0, 0)
    assert sorted(world.metrics.outcomes) == sorted(["length"] * num_admitted + ["rejected"] * (16 - num_admitted))


@pytest.mark.parametrize("fields", [{"n": 4}, {"prompt": ["a"] * 4}, {"prompt": ["a", "b"], "n": 2}])
async def test_a_request_that_no_queue_could_take_is_refused_for_good(world, client, fields: dict) -> None:
    Queue(world, num_workers=4, max_queued_requests=3, max_queued_tokens=10)
    response = await client.post(PATH, json=BODY | fields)
    assert response.status_code == 400, response.text
    assert "4 choices" in response.json()["error"]["message"]
    assert response.headers["x-should-retry"] == "false"
    response = await client.post(PATH, json=BODY | {"prompt": "hello world" * 6})
    assert response.status_code == 400
    assert "12 prompt tokens" in response.json()["error"]["message"]
    assert (await client.post(PATH, json=BODY | {"n": 3})).status_code == 200


async def test_places_of_clients_that_left_are_free(world) -> None:
    queue = Queue(world, num_workers=0, max_queued_requests=2)
    async with connect(world) as client:
        for num_turns in range(12):
            tasks = [asyncio.ensure_future(client.post(PATH, json=BODY | {"stream": n > 0})) for n in range(2)]
            for _ in range(num_turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for _ in range(20):
                await asyncio.sleep(0)
            assert queue.admission.num_waiting == 0


async def test_openais_client_gets_in_with_the_retries_that_it_makes_by_itself(world) -> None:
    queue = Queue(world, num_workers=1, max_queued_requests=4)
    world.engine.delay = 0.05
    queue.drain_rate.watch(waited=True, waits=True)
    for _ in range(100):  # what the server has measured before
        queue.drain_rate.count()
    waits: list[float] = []

    async def note(response: httpx.Response) -> None:
        if response.status_code == 429:
            waits.append(float(response.headers["retry-after-ms"]))

    with world.serve() as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            client._client.event_hooks["response"].append(note)
            assert client.max_retries == 2
            asked = [client.completions.create(model="tiny", prompt="hello", max_tokens=2) for _ in range(14)]
            answers = await asyncio.gather(*asked)
    assert [answer.choices[0].finish_reason for answer in answers] == ["length"] * 14
    assert waits, "nobody was refused"
    assert len(set(waits)) == len(waits)
    assert queue.most_waiting <= 4
