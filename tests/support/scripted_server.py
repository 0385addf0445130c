"""A server that does what a script says, and writes down when it did it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reply:
    """pieces: (seconds to wait before, bytes), each a chunk of its own. ending: whole (proper end of the body),
    disconnect (the connection closes in the middle), hang (nothing more comes)"""

    pieces: tuple[tuple[float, bytes], ...]
    status: int = 200
    content_type: str = "text/event-stream; charset=utf-8"
    ending: str = "whole"
    framing: str = "chunked"  # or close: the end of the connection ends the body


@dataclass
class Served:
    """One request as the server saw it; times on the clock that the client uses too."""

    path: str
    body: dict
    headers: dict
    received_at: float
    sent_at: list[float] = field(default_factory=list)


Script = Callable[[int, Served], Reply]


class ScriptedServer:
    """`script(index, request)` gives the reply to the index-th generation request. metrics: what GET /metrics says"""

    def __init__(self, script: Script, *, port: int = 0, metrics: Callable[[], str] | None = None) -> None:
        self.script, self.port, self.metrics = script, port, metrics
        self.served: list[Served] = []
        self.num_connections = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task] = set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopped.wait()
        for _ in range(5):  # turns of the loop: who has just connected is accepted, gets a transport, then a task
            await asyncio.sleep(0)
        server.close()  # a connection between its acceptance and its transport would stay open for ever
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()  # not even a client that reads nothing keeps it open
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()  # or the loop may end before the socket is closed
            self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head.split("\r\n")[1:] if line)}
        if method == "GET":
            return self._answer_get(path, writer)
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        served = Served(path, body, headers, time.perf_counter())
        self.served.append(served)
        return await self._play(self.script(len(self.served) - 1, served), served, writer)

    def _answer_get(self, path: str, writer: asyncio.StreamWriter) -> bool:
        known = {"/v1/models": {"object": "list", "data": [{"id": "scripted"}]}, "/version": {"version": "7.8.9"}}
        text = json.dumps(known.get(path, {})).encode()
        status = 200 if path in known else 404
        if path == "/metrics" and self.metrics is not None:
            text, status = self.metrics().encode(), 200
        writer.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n" % status)
        writer.write(b"content-length: %d\r\n\r\n%s" % (len(text), text))
        return True

    async def _play(self, reply: Reply, served: Served, writer: asyncio.StreamWriter) -> bool:
        framing = b"transfer-encoding: chunked" if reply.framing == "chunked" else b"connection: close"
        head = f"HTTP/1.1 {reply.status} X\r\ncontent-type: {reply.content_type}\r\n".encode() + framing + b"\r\n\r\n"
        for delay, piece in reply.pieces:
            if delay:
                await asyncio.sleep(delay)
            served.sent_at.append(time.perf_counter())
            writer.write(head + (b"%x\r\n%s\r\n" % (len(piece), piece) if reply.framing == "chunked" else piece))
            head = b""
        if reply.ending == "hang":
            await asyncio.sleep(60)
        if reply.ending == "whole" and reply.framing == "chunked":
            writer.write(head + b"0\r\n\r\n")
            return True
        await writer.drain()
        return False


def event(
    text: str | None = None,
    *,
    finish_reason: str | None = None,
    usage: tuple[int, int] | None = None,
    chat: bool = False,
) -> bytes:
    """One completion chunk. usage: prompt and output tokens, in a chunk without choices if there is no text."""
    body: dict = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "scripted", "choices": []}
    if text is not None or finish_reason is not None:
        content = {"delta": {"content": text}} if chat else {"text": text or ""}
        body["choices"] = [{"index": 0, **content, "finish_reason": finish_reason}]
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def whole_answer(served: Served, *, first: float = 0.0, gap: float = 0.0) -> Reply:
    """As many tokens as were asked for, one per event, then the usage and the end marker."""
    count = served.body["max_tokens"]
    pieces = [(first, event(" t0"))] + [(gap, event(f" t{i}")) for i in range(1, count)]
    prompt = served.body.get("prompt") or json.dumps(served.body.get("messages"))
    num_prompt_tokens = len(prompt if isinstance(prompt, list) else prompt.split())
    pieces += [(0.0, event(finish_reason="length")), (0.0, event(usage=(num_prompt_tokens, count))), (0.0, DONE)]
    return Reply(tuple(pieces))
