"""Events on the wire: keep-alives, the moment at which a stream begins, and streams that are cut."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

from server.errors import ApiError
from server.generation.choice import Delta
from server.generation.streaming import MARK, EventStream, deliver, deliver_stream, make_text_frame
from server.generation.wires import DATA_EVENTS, JsonLines, ServerSentEvents, Wire
from server.protocol.responses import Completion, CompletionChoice, error_reply


class Words:
    """A generation of scripted deltas; an exception among them is raised, a number is a pause in seconds.

    Those of a list come together.
    """

    def __init__(self, *script: str | list[str] | float | Exception) -> None:
        self.script = script
        self.is_closed = False
        self.job = SimpleNamespace(request_id="r", choices=[SimpleNamespace(index=0)])

    async def deltas(self):
        try:
            for item in self.script:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, float):
                    await asyncio.sleep(item)
                else:
                    yield [Delta(index=0, text=text) for text in ([item] if isinstance(item, str) else item)]
        finally:
            self.is_closed = True


class PlainWriter:
    def chunks(self, delta: Delta):
        yield self.reply([delta])

    def text_chunk(self, index: int, text: str):
        return self.reply([Delta(index=index, text=text)])

    def last_chunk(self):
        return None

    def failure(self, error: ApiError):
        yield error_reply(error)

    def reply(self, choices: list[Delta]) -> Completion:
        text = "".join(delta.text for delta in choices)
        choice = CompletionChoice(index=0, text=text)
        return Completion(id="i", created=0, model="m", system_fingerprint="f", choices=[choice])


class Client:
    """The other end of an ASGI connection. `leave` hangs up."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[dict] = []
        self.scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        self.receive_calls = 0

    def leave(self) -> None:
        self.gone.set()

    async def receive(self) -> dict:
        self.receive_calls += 1
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def run(self, response: EventStream) -> None:
        async with asyncio.timeout(10):
            await response(self.scope, self.receive, self.send)


async def start(client: Client, words: Words, patience: float = 10.0, wire: Wire = DATA_EVENTS):
    return await deliver_stream(client, words, PlainWriter(), headers={"x-a": "b"}, patience=patience, wire=wire)


async def test_events_have_data_lines_only_and_end_in_done() -> None:
    client, words = Client(), Words("a", "b\n\n\r", "é\u2028")
    await client.run(await start(client, words))
    *events, done, end = client.body.decode().split("\n\n")
    assert len(events) == 3
    assert all(event.startswith("data: {") and "\n" not in event and "\r" not in event for event in events)
    assert (done, end) == ("data: [DONE]", "")
    headers = dict(client.sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"x-a"] == b"b"
    assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_deltas_that_come_together_are_sent_at_once() -> None:
    client, words = Client(), Words("a", ["b", "c", "d"], ["e"])
    await client.run(await start(client, words))
    events = [message["body"].count(b"data: {") for message in client.sent[1:]]
    assert events == [1, 3, 1, 0, 0]
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in client.body.split(b"\n\n") if b"data: {" in line]
    assert texts == list("abcde")


async def test_a_failure_on_the_first_delta_is_raised_before_the_response_is_built() -> None:
    client, words = Client(), Words(ApiError(500, "no"))
    with pytest.raises(ApiError):
        await start(client, words)
    assert words.is_closed
    assert client.sent == []


async def test_silence_is_filled_with_comments() -> None:
    client, words = Client(), Words("a", 0.5, "b", 0.01, "c")
    await client.run(await start(client, words, patience=0.1))
    parts = [message["body"] for message in client.sent[1:-1]]
    kinds = ["comment" if part == b": keep-alive\n\n" else "event" for part in parts]
    assert kinds[0] == "event"
    assert 2 <= kinds.count("comment") <= 5
    assert set(kinds[1:-3]) == {"comment"}
    assert kinds[-3:] == ["event"] * 3


async def test_silence_is_filled_with_what_a_wire_has_for_it() -> None:
    ping = ServerSentEvents(keep_alive=b"event: ping\n\n")
    client = Client()
    await client.run(await start(client, Words("a", 0.3, "b"), patience=0.1, wire=ping))
    assert b"event: ping\n\n" in client.body
    assert not client.body.endswith(b"data: [DONE]\n\n")
    client = Client()
    await client.run(
        await start(client, Words("a\u2028", 0.3, "b", "c", ApiError(500, "no")), patience=0.1, wire=JsonLines())
    )
    lines = [json.loads(line) for line in client.body.decode().splitlines()]
    assert [line["choices"][0]["text"] for line in lines[:3]] == ["a\u2028", "b", "c"]
    assert lines[3]["error"]["message"] == "no"


async def test_a_stream_begins_without_its_first_delta_if_that_takes_long() -> None:
    client, words = Client(), Words(0.3, ApiError(500, "too late for a status"))
    response = await start(client, words, patience=0.05)
    assert response.status_code == 200
    await client.run(response)
    assert client.body.startswith(b": keep-alive\n\n")
    assert client.body.endswith(b"data: [DONE]\n\n")
    assert b"too late for a status" in client.body


async def test_a_client_that_leaves_before_the_first_delta_ends_the_generation() -> None:
    client, words = Client(), Words(10.0, "a")
    asyncio.get_running_loop().call_later(0.02, client.leave)
    assert (await start(client, words)).status_code == 499
    assert words.is_closed


async def test_a_client_that_leaves_in_the_middle_ends_the_generation() -> None:
    client, words = Client(), Words("a", 10.0, "b")
    response = await start(client, words)
    asyncio.get_running_loop().call_later(0.02, client.leave)
    await client.run(response)
    assert words.is_closed
    assert client.body.count(b"data: ") == 1


async def test_a_client_that_leaves_while_a_late_first_delta_is_awaited_ends_the_generation() -> None:
    client, words = Client(), Words(10.0, "a")
    response = await start(client, words, patience=0.01)
    asyncio.get_running_loop().call_later(0.02, client.leave)
    await client.run(response)
    assert words.is_closed


async def test_a_response_that_cannot_be_sent_closes_the_generation() -> None:
    client, words = Client(), Words("a", "b")
    response = await start(client, words)

    async def broken(message: dict) -> None:
        raise OSError("the connection is gone")

    with pytest.raises((OSError, ExceptionGroup)):
        await response(client.scope, client.receive, broken)
    assert words.is_closed


async def test_a_reader_that_does_not_read_holds_the_generation_back() -> None:
    client, words = Client(), Words(*"abcdefgh")
    reads = asyncio.Semaphore(3)

    async def slow(message: dict) -> None:
        await reads.acquire()
        client.sent.append(message)

    response = await start(client, words)
    task = asyncio.create_task(response(client.scope, client.receive, slow))
    await asyncio.sleep(0.05)
    assert len(client.sent) == 3
    assert not words.is_closed
    client.leave()
    await task
    assert words.is_closed


async def test_a_whole_answer_is_abandoned_when_the_client_leaves() -> None:
    client, words = Client(), Words("a", 10.0, "b")
    asyncio.get_running_loop().call_later(0.02, client.leave)
    response = await deliver(client, words, PlainWriter(), headers={})
    assert response.status_code == 499
    assert words.is_closed


async def test_a_cancelled_handler_closes_its_generation() -> None:
    for send in (deliver, deliver_stream):
        words = Words(10.0, "a")
        task = asyncio.create_task(send(Client(), words, PlainWriter(), headers={}))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert words.is_closed


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
async def test_no_character_of_an_answer_ends_a_line_of_a_stream(world, client, character: str) -> None:
    """JSON may hold them as they are, but Python's splitlines and many event readers cut there."""
    text = f"a{character}b é🙂"
    world.engine.say(text)
    body = {"model": "tiny", "prompt": "a", "stream": True, "max_tokens": 30}
    raw = (await client.post("/v1/completions", json=body)).content.decode()
    assert all(line.startswith("data: ") for line in raw.splitlines() if line)
    events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == text


class Narrator(PlainWriter):
    """Puts what is said of the choice's text into other fields of its chunks too."""

    def __init__(self, name: str) -> None:
        self.name = name

    def reply(self, choices: list[Delta]) -> Completion:
        reply = super().reply(choices)
        reply.model = self.name
        return reply


@pytest.mark.parametrize("name", ["m", "é\u2028", '"text":""', MARK, f"a {MARK}", json.dumps(MARK)])
@pytest.mark.parametrize("text", ["plain", '"\\\n\r', "é\u2028\x85 🙂", "\x00\x1f", MARK, "", "data: [DONE]"])
def test_what_is_encoded_ahead_is_what_would_be_encoded_then(name: str, text: str) -> None:
    frame = make_text_frame(Narrator(name), 0)
    if frame is None:
        assert MARK in name
        return
    (line, *rest) = frame.encoded(text).split(b"\n\n")
    assert rest == [b""]
    reply = json.loads(line.removeprefix(b"data: "))
    assert (reply["model"], reply["choices"][0]["text"]) == (name, text)
    assert len(line.decode().splitlines()) == 1
