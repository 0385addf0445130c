"""Whatever comes over raw connections, without a key: the server's memory stays, and it answers and ends as ever."""

from __future__ import annotations

import contextlib
import http.client
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil
import pytest

MIB = 2**20
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass
class Attacker:
    """Raw connections to one server, all of which stay open until the end. `size` is from 0 to 1."""

    port: int
    size: float
    connections: list[socket.socket] = field(default_factory=list)

    def scaled(self, count: int) -> int:
        return max(1, int(count * self.size))

    @property
    def body_pieces(self) -> int:
        """Of 64 KiB: 15 MB, or where few are sent a quarter of it."""
        return int(230 * max(self.size, 0.25))

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=2)
        self.connections.append(connection)
        return connection

    def send(self, *parts: bytes) -> socket.socket:
        """On a connection of its own, as much of it as the server takes."""
        connection = self.connect()
        with contextlib.suppress(OSError):
            for part in parts:
                connection.sendall(part)
        return connection

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


def endless_trailers(attacker: Attacker) -> None:
    for _ in range(4):
        trailers = [b"X-Trailer-%d: abcdef\r\n" % i * 1000 for i in range(attacker.scaled(600))]
        attacker.send(CHUNKED, b"2\r\n{}\r\n0\r\n", *trailers)


def one_endless_trailer(attacker: Attacker) -> None:
    for _ in range(4):
        attacker.send(CHUNKED, b"2\r\n{}\r\n0\r\nX: ", *[b"x" * 65536] * attacker.scaled(1000))


def unfinished_heads(attacker: Attacker) -> None:
    for _ in range(attacker.scaled(500)):
        attacker.send(b"GET /livez HTTP/1.1\r\nHost: a\r\n", b"".join(b"A%d: b\r\n" % i for i in range(6500))[:60_000])


def unfinished_heads_of_one_header(attacker: Attacker) -> None:
    for _ in range(attacker.scaled(1500)):
        attacker.send(b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 60_000)


def heads_of_many_small_headers(attacker: Attacker) -> None:
    for _ in range(attacker.scaled(1500)):
        attacker.send(b"GET /livez HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * 120)


def half_sent_bodies(attacker: Attacker) -> None:
    for _ in range(attacker.scaled(100)):
        attacker.send(HEAD + b"Content-Length: 16000000\r\n\r\n", *[b" " * 65536] * attacker.body_pieces)


def half_sent_bodies_to_open_paths(attacker: Attacker) -> None:
    head = b"POST /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 16000000\r\n\r\n"
    for _ in range(attacker.scaled(100)):
        attacker.send(head, *[b" " * 65536] * attacker.body_pieces)


def half_requests(attacker: Attacker) -> None:
    for i in range(attacker.scaled(1000)):
        attacker.send((HEAD + b"Content-Length: 1000\r\n\r\n{}")[: 10 + i % 120])


def byte_by_byte(attacker: Attacker) -> None:
    connections = [attacker.connect() for _ in range(attacker.scaled(400))]
    for byte in HEAD + b"X-A: " + b"b" * 50:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.send(bytes([byte]))


def idle_connections(attacker: Attacker) -> None:
    for i in range(attacker.scaled(5000)):
        attacker.send(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n" if i % 2 else b"")


def huge_chunk_extensions(attacker: Attacker) -> None:
    for _ in range(4):
        attacker.send(CHUNKED, b"2;", *[b"x" * 65536] * attacker.scaled(1000))
    for _ in range(4):
        attacker.send(CHUNKED, *[(b"1;" + b"x" * 4096 + b"\r\n \r\n") * 16] * attacker.scaled(1000))


def tiny_chunks(attacker: Attacker) -> None:
    for _ in range(attacker.scaled(50)):
        attacker.send(CHUNKED, b"1\r\n \r\n" * attacker.scaled(300_000))


def empty_lines(attacker: Attacker) -> None:
    for _ in range(attacker.scaled(500)):
        attacker.send(b"\r\n" * 30_000)


def pipelined_requests(attacker: Attacker) -> None:
    for _ in range(attacker.scaled(100)):
        request = b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 1000 + b"\r\n\r\n"
        connection = attacker.connect()
        connection.settimeout(0.02)  # the answers are never read
        with contextlib.suppress(OSError):
            for _ in range(attacker.scaled(40)):
                connection.sendall(request * 250)


def pipelined_garbage(attacker: Attacker) -> None:
    for i in range(attacker.scaled(200)):
        garbage = random.Random(i).randbytes(4096) * 16
        attacker.send(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n" * (i % 3), garbage)


ATTACKS = [
    endless_trailers, one_endless_trailer, unfinished_heads, unfinished_heads_of_one_header,
    heads_of_many_small_headers, half_sent_bodies, half_sent_bodies_to_open_paths, half_requests, byte_by_byte,
    idle_connections, huge_chunk_extensions, tiny_chunks, empty_lines, pipelined_requests, pipelined_garbage,
]  # fmt: skip


class Watch:
    """The largest size of a process, and what its /livez said, while something goes on."""

    def __init__(self, process: psutil.Process, url: str) -> None:
        self._process = process
        self._address = url.removeprefix("http://")
        self._is_over = threading.Event()
        self.largest = 0
        self.longest = 0.0  # seconds; told, not asserted
        self.statuses: list[int] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=each) for each in (self._measure, self._ask)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join()

    def _measure(self) -> None:
        while not self._is_over.wait(0.01):
            self.largest = max(self.largest, self._process.memory_info().rss)

    def _ask(self) -> None:
        while not self._is_over.wait(0.05):
            begun_at = time.monotonic()
            with contextlib.closing(http.client.HTTPConnection(self._address, timeout=30)) as connection:
                connection.request("GET", "/livez")
                self.statuses.append(connection.getresponse().status)
            self.longest = max(self.longest, time.monotonic() - begun_at)


def attack(server, act: Callable[[Attacker], None], size: float, *, max_growth: float) -> None:
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    watch = Watch(process, server.url)
    attacker = Attacker(int(server.url.rpartition(":")[2]), size)
    with watch.running(), contextlib.closing(attacker):
        act(attacker)
        time.sleep(0.2)
    growth = watch.largest - before
    print(f"{act.__name__}: {growth / MIB:.1f} MiB, /livez after at most {watch.longest:.3f} s")
    assert growth < max_growth, act.__name__
    assert set(watch.statuses) <= {200}
    assert server.complete("a", max_tokens=2)


def test_a_few_hostile_connections_take_little_and_everybody_else_is_served(start_server):
    """With little room, so that few connections show whether it is kept."""
    rooms = {"max_connections": 200, "max_total_head_bytes": MIB, "max_total_body_bytes": 4 * MIB}
    with start_server(*[f"--set=operation.{name}={value}" for name, value in rooms.items()]) as server:
        server.complete("warm", max_tokens=2)
        for act in ATTACKS:
            attack(server, act, 0.1, max_growth=16 * MIB)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [[], ["--api-key", "secret"]], ids=["without keys", "with keys"])
def test_many_hostile_connections_take_little_and_everybody_else_is_served(start_server, options):
    with start_server(*options) as server:
        server.client.headers["Authorization"] = "Bearer secret"
        server.complete("warm", max_tokens=2)
        for act in ATTACKS:
            attack(server, act, 1.0, max_growth=64 * MIB)


def test_half_requests_do_not_delay_the_end(start_server):
    with start_server("--shutdown-timeout", "600") as server:
        attacker = Attacker(int(server.url.rpartition(":")[2]), 0.05)
        with contextlib.closing(attacker):
            for act in (half_requests, half_sent_bodies, byte_by_byte):
                act(attacker)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
