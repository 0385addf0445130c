"""Server-sent events: sends deltas to a client as they come, with keep-alives, and aborts when it disconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, suppress
from typing import Protocol, TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, internal_error
from server.generation.choice import Choice, Delta, DeltaCollector
from server.generation.generation import Generation, Job
from server.generation.wires import DATA_EVENTS, Wire, without_line_ends
from server.json_encoding import encode_json
from server.off_loop import off_loop

logger = logging.getLogger(__name__)
T = TypeVar("T")

KEEP_ALIVE_SECONDS = 10.0
LARGE_DELTA = 256  # scored tokens; what tells of more is put into words off the event loop
POOLED_BYTES = 128  # of a vector: they cost as much as a scored token
PLAIN_TOKENS = 64  # which only add their text, or their number, to an answer: they cost as much as a scored one
MARK = "the text of a chunk"  # stands for it where the rest is encoded ahead

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; the access log does

encode = msgspec.json.Encoder().encode


class Replier(Protocol):
    """The interface of an endpoint's formatter, made for one request."""

    def reply(self, choices: list[Delta]) -> msgspec.Struct:
        """The whole answer at once; one delta per choice, in order."""
        ...


class ReplyWriter(Replier, Protocol):
    """The same, where the answer may also be streamed."""

    def chunks(self, delta: Delta) -> Iterable[msgspec.Struct]:
        """What a stream says of a delta."""
        ...

    def text_chunk(self, index: int, text: str) -> msgspec.Struct | None:
        """What a stream says of a delta in the middle of a choice, if that depends on nothing but its text."""
        ...

    def last_chunk(self) -> msgspec.Struct | None:
        """What a stream says after the last delta, if anything."""
        ...

    def failure(self, error: ApiError) -> Iterable[msgspec.Struct]:
        """What a stream says of an error that ends it."""
        ...


async def deliver(request: Request, generation: Generation, writer: Replier, *, headers: dict[str, str]) -> Response:
    """Runs the generation and answers with all of it. If the client leaves, the generation is aborted."""
    choices = [DeltaCollector(choice.index) for choice in generation.job.choices]

    async def collect() -> None:
        async with aclosing(generation.deltas()) as deltas:
            async for pieces in deltas:
                for delta in pieces:
                    choices[delta.index].add(delta)

    work = asyncio.ensure_future(collect())
    if not await _finished(request, work):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    work.result()
    deltas = [choice.collected() for choice in choices]
    if sum(map(_num_items, deltas, generation.job.choices)) > LARGE_DELTA:
        body = await off_loop(lambda: encode_json(writer.reply(deltas)))
    else:
        body = encode(writer.reply(deltas))
    return Response(body, media_type="application/json", headers=headers)


async def deliver_stream(
    request: Request,
    generation: Generation,
    writer: ReplyWriter,
    *,
    headers: dict[str, str],
    patience: float = KEEP_ALIVE_SECONDS,
    wire: Wire = DATA_EVENTS,
) -> Response:
    """Waits for the first deltas, so that what fails early has a status, and then streams.

    Where nothing comes for `patience` seconds, the stream begins without it: proxies give up on silence.
    """
    deltas = generation.deltas()
    first = asyncio.ensure_future(anext(deltas))
    stays = await _finished(request, first, seconds=patience)
    if not stays or (first.done() and first.exception() is not None):
        await deltas.aclose()
        if not stays:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        first.result()
    source = EventSource(deltas, first, writer, generation.job, wire)
    return EventStream(source, headers, patience=patience)


async def _finished(request: Request, work: asyncio.Future[T], *, seconds: float | None = None) -> bool:
    """Waits for the work, at most so many seconds. False if the client left; then the work is cancelled and over.

    Without this, the work for a client that has left would go on to its end: nothing else watches the connection
    before the response begins.
    """
    gone = asyncio.ensure_future(_disconnected(request))
    over = asyncio.Event()
    work.add_done_callback(lambda _: over.set())
    gone.add_done_callback(lambda _: over.set())
    stays = True
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await over.wait()
        stays = work.done() or not gone.done()
    except asyncio.CancelledError:
        stays = False
        raise
    finally:
        gone.cancel()
        if not stays:
            work.cancel()
        await asyncio.gather(gone, *([] if stays else [work]), return_exceptions=True)
    return stays


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventSource:
    """A generation that has been started, as the bytes of events. `close` ends it, whether `events` was read or not."""

    def __init__(
        self,
        deltas: AsyncGenerator[list[Delta], None],
        first: asyncio.Future[list[Delta]],
        writer: ReplyWriter,
        job: Job,
        wire: Wire = DATA_EVENTS,
    ) -> None:
        self.wire = wire
        self._deltas = deltas
        self._first = first
        self._writer = writer
        self._choices = job.choices
        self._request_id = job.request_id
        self._text_frames: dict[int, TextFrame | None] = {}  # by choice

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Those of a step in one piece, which is sent at once."""
        try:
            yield await self._joined(await self._first)
            async for deltas in self._deltas:
                yield await self._joined(deltas)
            if (last := self._writer.last_chunk()) is not None:
                yield self._event(last)
        except ApiError as error:
            yield self._failure(error)
        except Exception:  # the border: the status is sent, so the client can only be told here
            logger.exception("the stream of request %s failed", self._request_id)
            yield self._failure(internal_error(self._request_id))
        if self.wire.end:
            yield self.wire.end

    async def close(self) -> None:
        self._first.cancel()
        await asyncio.gather(self._first, return_exceptions=True)
        await self._deltas.aclose()

    async def _joined(self, deltas: list[Delta]) -> bytes:
        pieces = []
        for delta in deltas:
            frame = self._text_frame(delta)
            pieces.append(await self._worded(delta) if frame is None else frame.encoded(delta.text))
        return b"".join(pieces)

    def _text_frame(self, delta: Delta) -> TextFrame | None:
        if not delta.text or delta.is_first or delta.finish_reason is not None or self.wire is not DATA_EVENTS:
            return None
        if delta.index not in self._text_frames:
            self._text_frames[delta.index] = make_text_frame(self._writer, delta.index)
        return self._text_frames[delta.index]

    async def _worded(self, delta: Delta) -> bytes:
        chunks = self._writer.chunks
        if _num_items(delta, self._choices[delta.index]) > LARGE_DELTA:  # the scores of a long prompt, or its text
            frame = self.wire.frame
            return await off_loop(lambda: b"".join([frame(chunk, encode_json(chunk)) for chunk in chunks(delta)]))
        return b"".join(self._event(chunk) for chunk in chunks(delta))

    def _event(self, message: msgspec.Struct) -> bytes:
        return self.wire.frame(message, encode(message))

    def _failure(self, error: ApiError) -> bytes:
        return b"".join(self._event(message) for message in self._writer.failure(error))


class TextFrame:
    """An event of which all but the text is known before it comes, and encoded once."""

    def __init__(self, head: bytes, tail: bytes) -> None:
        self._head, self._tail = b"data: " + head, tail + b"\n\n"

    def encoded(self, text: str) -> bytes:
        return self._head + without_line_ends(encode(text)) + self._tail


def make_text_frame(writer: ReplyWriter, index: int) -> TextFrame | None:
    """Of a choice's deltas; None where they say more than their text."""
    empty, marked = writer.text_chunk(index, ""), writer.text_chunk(index, MARK)
    if empty is None or marked is None:
        return None
    head, mark, tail = without_line_ends(encode(marked)).partition(encode(MARK))
    if not mark or head + encode("") + tail != without_line_ends(encode(empty)):  # the mark is also a model's name
        return None
    return TextFrame(head, tail)


class EventStream(StreamingResponse):
    """Sends the events, and a sign of life whenever nothing else was sent for `patience` seconds."""

    def __init__(self, source: EventSource, headers: dict[str, str], *, patience: float) -> None:
        self._patience = patience
        self._source = source
        self._keep_alive_bytes = source.wire.keep_alive
        self._events = source.events()
        self._last_sent_at = 0.0
        unbuffered = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events, headers={**unbuffered, **headers}, media_type=source.wire.media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._source.close()

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        now = asyncio.get_running_loop().time
        self._last_sent_at = now()
        keep_alive = asyncio.ensure_future(self._keep_alive(send))
        try:
            async for event in self._events:
                self._last_sent_at = now()
                await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            keep_alive.cancel()
            await asyncio.gather(keep_alive, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        while self._keep_alive_bytes:
            due_at = self._last_sent_at + self._patience
            if now() < due_at:
                await asyncio.sleep(due_at - now())
                continue
            self._last_sent_at = now()
            await send({"type": "http.response.body", "body": self._keep_alive_bytes, "more_body": True})


def _num_items(delta: Delta, choice: Choice) -> float:
    """How much an answer may say of it. The first may repeat the prompt."""
    num_scored = len(delta.logprobs) + len(delta.prompt_logprobs)
    num_plain = len(delta.token_ids) + (len(choice.prompt.token_ids) if delta.is_first else 0)
    return num_scored + num_plain / PLAIN_TOKENS + len(delta.pooled or b"") / POOLED_BYTES
