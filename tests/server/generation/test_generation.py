"""How requests end: by themselves, by a deadline, by an abort, by a client that leaves, by a failure; always once."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from typing import Self

import httpx
import pytest

from engine.client.client import EngineError
from engine.client.outbox import Outbox
from engine.types import StepOutput
from server.errors import ApiError
from server.generation.active_requests import ActiveRequests
from tests.support.fake_engine import FakeStream
from tests.support.server_world import events, wait_until

COMPLETION = ("/v1/completions", {"model": "tiny", "prompt": "hello", "max_tokens": 100})
CHAT = (
    "/v1/chat/completions",
    {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 100},
)
BOTH = pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT], ids=["completion", "chat"])
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])


def finishes(response: httpx.Response) -> list[tuple[str, int | str | None]]:
    """The reasons of the choices' ends, and what it was that ended them."""
    answers = events(response.text) if "event-stream" in response.headers["content-type"] else [response.json()]
    choices = [choice for answer in answers for choice in answer["choices"]]
    return [(choice["finish_reason"], choice["stop_reason"]) for choice in choices if choice["finish_reason"]]


@BOTH
@STREAMED
async def test_a_deadline_that_passes_in_decoding_ends_with_length_because_of_the_timeout(
    world, client, path, body, streamed
) -> None:
    world.engine.delay = 0.1
    response = await client.post(path, json=body | {"timeout": 3, "stream": streamed, "n": 2})
    assert response.status_code == 200
    assert finishes(response) == [("length", "timeout")] * 2
    assert len(world.engine.aborted) == 2
    assert world.metrics.outcomes == ["timeout"]
    if not streamed:
        assert 0 < response.json()["usage"]["completion_tokens"] < 200


@BOTH
@STREAMED
@pytest.mark.parametrize("how", ["body", "header", "config"])
async def test_a_deadline_that_passes_in_the_queue_is_408(world, client, path, body, streamed, how: str) -> None:
    world.engine.first_delay = 10
    headers = {"x-request-timeout-ms": "50"} if how == "header" else {}
    if how == "config":
        world.configure({"limits": {"request_timeout": 0.05}})
    fields = {"timeout": 0.05} if how == "body" else {"timeout": 9} if how == "header" else {}
    response = await client.post(path, json=body | fields | {"stream": streamed}, headers=headers)
    assert response.status_code == 408, response.text
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert world.engine.running == set()
    assert world.metrics.outcomes == ["timeout"]


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "", "9" * 30, "１", "86400001"])
async def test_a_timeout_header_that_is_no_number_of_milliseconds_is_refused(client, value: str) -> None:
    path, body = COMPLETION
    response = await client.post(path, json=body, headers={b"x-request-timeout-ms": value.encode()})
    assert response.status_code == 400


@BOTH
@STREAMED
async def test_an_aborted_request_ends_with_an_error_that_says_so(world, client, path, body, streamed) -> None:
    world.engine.first_delay = 10
    asking = asyncio.create_task(
        client.post(path, json=body | {"stream": streamed, "n": 3}, headers={"X-Request-Id": "mine"})
    )
    await _until(lambda: len(world.engine.running) == 3)
    deletion = await client.delete("/v1/requests/mine")
    assert (deletion.status_code, deletion.json()["deleted"]) == (200, True)
    response = await asking
    assert (response.status_code, response.json()["error"]["code"]) == (409, "request_aborted")
    assert len(world.engine.aborted) == 3
    assert world.metrics.outcomes == ["abort"]
    assert (await client.delete("/v1/requests/mine")).status_code == 404
    assert len(world.state.active_requests) == 0


@BOTH
def test_a_stream_that_is_aborted_ends_with_an_error_event(world, path, body) -> None:
    world.engine.delay = 0.02
    headers = {"X-Request-Id": "a/b=1"}
    with (
        world.serve() as url,
        httpx.stream("POST", url + path, json=body | {"stream": True}, headers=headers) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        prefix = "cmpl" if path == COMPLETION[0] else "chatcmpl"
        assert httpx.delete(f"{url}/v1/requests/{prefix}-a%2Fb=1").status_code == 200
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"code":"request_aborted"' in rest[-2]
    assert len(world.engine.aborted) == 1


async def test_an_abort_ends_all_requests_of_an_id(world, client) -> None:
    path, body = COMPLETION
    world.engine.first_delay = 10
    asking = [
        asyncio.create_task(client.post(path, json=body, headers={"X-Request-Id": name})) for name in ("a", "a", "b")
    ]
    await _until(lambda: len(world.engine.running) == 3)
    await client.delete("/v1/requests/a")
    await _until(lambda: len(world.engine.running) == 1)
    await client.delete("/v1/requests/b")
    assert [(await one).status_code for one in asking] == [409] * 3


async def test_an_abort_between_two_waits_is_not_lost() -> None:
    requests, outputs = ActiveRequests(), Outbox()
    with requests.register("", ("a", "b"), None, outputs):
        put(outputs, 1, 2)
        assert await take(outputs) == 1
        assert requests.abort("", "b")
        with pytest.raises(ApiError, match="aborted"):
            await take(outputs)
    assert not requests.abort("", "a")


async def test_an_abort_at_the_moment_of_the_deadline_raises_one_of_the_two() -> None:
    requests = ActiveRequests()
    loop = asyncio.get_running_loop()
    for lead in (-0.001, 0.0, 0.001):
        outputs = Outbox()
        with requests.register("", ("a",), loop.time() + 0.01, outputs):
            loop.call_at(loop.time() + 0.01 + lead, requests.abort, "", "a")
            with pytest.raises((ApiError, TimeoutError)):
                await take(outputs)


@BOTH
@STREAMED
@pytest.mark.parametrize("moment", ["queued", "decoding"])
def test_a_client_that_leaves_aborts_its_request(world, path, body, streamed, moment) -> None:
    world.engine.first_delay = 10 if moment == "queued" else 0
    world.engine.delay = 0.02
    with world.serve() as url:
        leave = threading.Event()
        request = httpx.Request("POST", url + path, json=body | {"stream": streamed, "n": 2})
        thread = threading.Thread(target=_send_and_leave, args=(request, leave))
        thread.start()
        wait_until(lambda: len(world.engine.running) == 2)
        if moment == "decoding":
            wait_until(lambda: world.metrics.num_tokens > 4)
        leave.set()
        thread.join()
        wait_until(lambda: len(world.engine.aborted) == 2)
        wait_until(lambda: world.metrics.outcomes == ["abort"])
        assert world.engine.running == set()
        assert len(world.state.active_requests) == 0


def _send_and_leave(request: httpx.Request, leave: threading.Event) -> None:
    with socket.create_connection((request.url.host, request.url.port)) as connection:
        head = f"POST {request.url.path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in request.headers.items())
        connection.sendall(head.encode() + b"\r\n" + request.read())
        assert leave.wait(20)


@BOTH
@STREAMED
@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("constraints", 400),
        ("request", 500),
        ("quarantined", 500),
        ("engine_failed", 503),
        ("stopped", 503),
    ],
)
async def test_a_failure_before_the_first_token_has_a_status(world, client, path, body, streamed, kind, status) -> None:
    world.engine.fail_after, world.engine.failure_kind = 0, kind
    response = await client.post(
        path, json=body | {"stream": streamed, "n": 2}, headers={"X-Request-Id": "the-request"}
    )
    assert response.status_code == status
    assert "the-request" in response.json()["error"]["message"]
    assert world.metrics.outcomes == ["invalid" if status == 400 else "error"]
    assert world.engine.running == set()


@BOTH
@pytest.mark.parametrize("kind", ["request", "stopped"])
async def test_a_failure_in_a_stream_is_an_event_and_the_end(world, client, path, body, kind) -> None:
    world.engine.fail_after, world.engine.failure_kind = 3, kind
    response = await client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.status_code == 200
    *content, last = events(response.text)
    assert last.keys() == {"error"}
    assert last["error"].keys() == {"message", "type", "param", "code"}
    assert content
    assert not any(choice["finish_reason"] for chunk in content for choice in chunk["choices"])
    assert world.metrics.outcomes == ["error"]


@BOTH
async def test_a_bug_in_a_stream_is_an_error_event(world, client, path, body, caplog) -> None:
    world.engine.logprobs = lambda token, top: 1 / 0
    world.engine.delay = 0.001
    normal = world.engine.outputs

    def outputs(request):
        for number, output in enumerate(normal(request)):
            if number == 3:
                raise ZeroDivisionError
            yield output

    world.engine.outputs = outputs
    response = await client.post(path, json=body | {"stream": True})
    *content, last = events(response.text)
    assert content
    assert last["error"]["code"] == "internal_error"
    assert "ZeroDivisionError" in caplog.text
    assert world.metrics.outcomes == ["error"]


@BOTH
@pytest.mark.parametrize("status", [429, 503])
async def test_what_admission_refuses_never_reaches_the_engine(world, client, path, body, status: int) -> None:
    world.admission.error = ApiError(status, "no", retry_after=3)
    response = await client.post(path, json=body)
    assert response.status_code == status
    assert response.headers["retry-after"] == "3"
    assert world.engine.requests == []
    assert world.metrics.outcomes == ["rejected"]


@BOTH
async def test_a_server_that_is_starting_says_503(world, client, path, body) -> None:
    world.engine.model = world.state.tokenizer = None
    response = await client.post(path, json=body)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1


async def test_every_request_is_counted_once_and_every_token(world, client) -> None:
    total = 0
    for path, body in (COMPLETION, CHAT):
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        for fields in ({"n": 2}, streamed, {"n": 129}, {"timeout": "x"}):
            response = await client.post(path, json=body | fields)
            if response.status_code == 200:
                whole = events(response.text)[-1] if "stream" in fields else response.json()
                total += whole["usage"]["completion_tokens"]
    assert world.metrics.num_tokens == total == 600
    assert world.metrics.num_arrived == len(world.metrics.outcomes) == 8
    assert world.metrics.outcomes.count("invalid") == 4
    assert world.metrics.num_first_tokens == 4


@pytest.mark.parametrize(("reasons", "outcome"), [((1, 5), "stop"), ((5, 5), "length")])
async def test_the_outcome_of_several_choices_is_the_least_happy(world, client, reasons, outcome) -> None:
    path, body = COMPLETION
    scripts = iter([[5, 6, 1], [5, 6, 7, reasons[0]]])
    world.engine.script = lambda request: next(scripts)
    await client.post(path, json=body | {"n": 2, "max_tokens": 4})
    assert world.metrics.outcomes == [outcome]


async def test_the_callers_id_is_used_everywhere(world, client) -> None:
    path, body = COMPLETION
    response = await client.post(path, json=body, headers={"X-Request-Id": "trace-7"})
    assert response.json()["id"] == "cmpl-trace-7"
    assert "trace-7" in world.engine.requests[-1].request_id
    response = await client.post(path, json=body | {"request_id": "body-8"})
    assert response.json()["id"] == "cmpl-body-8"
    response = await client.post(path, json=body | {"request_id": "body-8"}, headers={"X-Request-Id": "trace-9"})
    assert response.json()["id"] == "cmpl-trace-9"


class SteppedStream(FakeStream):
    """Puts out what an engine's step has for all requests at once; counts how often it is read."""

    num_takes = num_steps = 0

    def __enter__(self) -> Self:
        super().__enter__()
        for task in self._tasks.values():
            task.cancel()
        self._answers = {request.request_id: self._engine.outputs(request) for request in self._requests}
        self._stepping = asyncio.ensure_future(self._step())
        return self

    async def _step(self) -> None:
        while self._tasks:
            await asyncio.sleep(0.002)
            outputs = [next(self._answers[request_id], None) for request_id in self._tasks]
            SteppedStream.num_steps += any(outputs)
            for output in filter(None, outputs):
                self._outbox.put(output)

    async def take(self, max_num: int) -> list[StepOutput]:
        SteppedStream.num_takes += 1
        return await super().take(max_num)


@BOTH
def test_a_step_wakes_a_request_of_many_choices_once(world, path, body, monkeypatch) -> None:
    monkeypatch.setattr(SteppedStream, "num_takes", 0)
    monkeypatch.setattr(SteppedStream, "num_steps", 0)
    world.engine.generate = lambda requests: SteppedStream(world.engine, requests)
    world.engine.script = lambda request: [5] * 60
    with world.serve() as url:
        response = httpx.post(url + path, json=body | {"n": 8, "stream": True})
    assert finishes(response) == [("length", None)] * 8
    assert world.metrics.num_tokens == 8 * 60
    assert SteppedStream.num_steps == 60
    assert SteppedStream.num_takes <= 60 + 8  # where the machine is slow, two steps wait together


@STREAMED
async def test_a_choice_that_ends_leaves_the_others_as_they_are(world, client, streamed) -> None:
    """Each ends once, by itself, with what it would have said alone: by a stop string, a stop token or its length."""
    path, body = COMPLETION
    chance = random.Random(4)
    for _ in range(10):
        texts = ["".join(chance.choices("hello world of tokens", k=chance.randint(1, 40))) for _ in range(6)]
        scripts = iter([[*world.tokenizer.encode(text, add_special_tokens=False), 1] for text in texts])
        world.engine.script = lambda request, scripts=scripts: next(scripts)
        world.engine.step_size = chance.choice([1, 2, 5])
        world.engine.aborted.clear()
        response = await client.post(path, json=body | {"n": 6, "stream": streamed, "stop": "lo"})
        answers = events(response.text) if streamed else [response.json()]
        choices = [choice for answer in answers for choice in answer["choices"]]
        for index, text in enumerate(texts):
            own = [choice for choice in choices if choice["index"] == index]
            assert "".join(choice["text"] for choice in own) == text.partition("lo")[0]
            assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
        assert world.engine.running == set()


@BOTH
async def test_a_choice_that_fails_ends_its_request_once_and_no_other(world, client, path, body) -> None:
    world.engine.delay = 0.005
    normal, num_failed = world.engine.outputs, 0

    def outputs(request):
        nonlocal num_failed
        for number, output in enumerate(normal(request)):
            if number == 3 and request is world.engine.requests[1]:
                num_failed += 1
                raise EngineError("the engine broke", kind="request")
            yield output

    world.engine.outputs = outputs
    asking = asyncio.create_task(client.post(path, json=body | {"n": 3, "stream": True}))
    await _until(lambda: len(world.engine.requests) == 3)
    others = await client.post(path, json=body | {"n": 2, "stream": True})
    mine = await asking
    assert num_failed == 1
    *content, last = events(mine.text)
    assert content
    assert last["error"]["code"] == "engine_request"
    assert finishes(others) == [("length", None)] * 2
    assert len(world.engine.aborted) == 3
    assert sorted(world.metrics.outcomes) == ["error", "length"]


async def test_choices_of_a_merged_stream_do_not_wait_for_each_other(world, client) -> None:
    path, body = COMPLETION
    lengths = iter([1, 30])
    normal = world.engine.invent
    world.engine.script = lambda request: normal(request)[: next(lengths)]
    response = await client.post(path, json=body | {"n": 2, "stream": True})
    order = [choice["index"] for chunk in events(response.text) for choice in chunk["choices"]]
    assert order.index(0) <= 1
    assert order[-1] == 1


async def _until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)  # the fake engine has nothing to wait for


def put(outputs: Outbox, *numbers: int) -> None:
    for number in numbers:
        outputs.put(StepOutput(request_id="a", token_ids=[number]))


async def take(outputs: Outbox) -> int:
    (output,) = await outputs.take(1)
    return output.token_ids[0]


async def test_a_deadline_ends_a_request_whose_engine_is_silent_after_many_tokens() -> None:
    """One timer for all waits: those that came in time neither stop it nor put it off."""
    requests, outputs, loop = ActiveRequests(), Outbox(), asyncio.get_running_loop()
    deadline = loop.time() + 0.2
    with requests.register("", ("a",), deadline, outputs):
        for number in range(100):
            loop.call_soon(put, outputs, number)
            assert await take(outputs) == number
        with pytest.raises(TimeoutError):
            await take(outputs)
        assert loop.time() >= deadline


async def test_what_came_before_the_deadline_is_still_handed_out_and_nothing_after() -> None:
    requests, outputs, loop = ActiveRequests(), Outbox(), asyncio.get_running_loop()
    with requests.register("", ("a",), loop.time() + 0.01, outputs):
        put(outputs, 0, 1, 2)
        await asyncio.sleep(0.05)  # as a reader that is slow: it is not interrupted
        put(outputs, 3)
        assert [await take(outputs) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await take(outputs)


async def test_a_task_that_is_cancelled_at_the_moment_of_its_abort_is_cancelled() -> None:
    requests, outputs = ActiveRequests(), Outbox()
    with requests.register("", ("a",), None, outputs):
        waiting = asyncio.create_task(take(outputs))
        await asyncio.sleep(0)
        requests.abort("", "a")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_request_that_ended_leaves_no_timer(world, client) -> None:
    path, body = COMPLETION
    loop = asyncio.get_running_loop()
    response = await client.post(path, json=body | {"timeout": 1000})
    assert response.status_code == 200
    timers = [handle for handle in loop._scheduled if not handle.cancelled()]
    assert all(handle.when() < loop.time() + 900 for handle in timers)
