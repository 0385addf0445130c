"""Replicas behind a balancer: the accounts of clients, and the shipped configurations."""

import asyncio
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from loadtest.rollout.__main__ import RolloutResult, main
from loadtest.rollout.balancers import BALANCERS, CONFIGS, program
from loadtest.rollout.name_server import answer, name_server
from loadtest.rollout.processes import RolloutProcess
from loadtest.rollout.traffic import LARGE_BODY, Traffic
from tests.support import counting_engine

HAPROXY = (CONFIGS / "haproxy.cfg").read_text()
NGINX = (CONFIGS / "nginx.conf").read_text()


def is_installed(name: str) -> bool:
    try:
        return bool(program(name))
    except ValueError:
        return False


needs_haproxy = pytest.mark.skipif(not is_installed("haproxy"), reason="HAProxy is not installed")
needs_nginx = pytest.mark.skipif(not is_installed("nginx"), reason="nginx is not installed")


# The shipped configurations


def test_haproxy_keeps_a_body_of_128_kilobytes_for_a_retry() -> None:
    assert int(re.search(r"tune\.bufsize (\d+)", HAPROXY)[1]) >= 131072 + 8192
    assert "retry-on conn-failure empty-response 503" in HAPROXY


@pytest.mark.parametrize(
    "option", ["http-no-delay", "http-buffer-request", "abortonclose", "redispatch 1", "forwardfor", "httpchk"]
)
def test_haproxy_does_what_streams_and_retries_need(option: str) -> None:
    assert f"option {option}" in HAPROXY
    assert "uri /readyz" in HAPROXY


def test_nginx_does_what_streams_and_retries_need() -> None:
    for line in ("proxy_buffering off;", "proxy_http_version 1.1;", 'proxy_set_header Connection "";'):
        assert line in NGINX
    assert "proxy_next_upstream error timeout http_503 non_idempotent;" in NGINX


def test_time_outs_fit_those_of_the_server() -> None:
    """A balancer gives up idle connections before the server does, and answers never before the server."""
    assert int(re.search(r"timeout http-keep-alive (\d+)s", HAPROXY)[1]) < 75
    assert all(int(minutes) >= 15 for minutes in re.findall(r"timeout (?:client|server) (\d+)m", HAPROXY))
    assert int(re.search(r"proxy_read_timeout (\d+)m", NGINX)[1]) >= 15


@needs_haproxy
def test_haproxy_can_read_its_configuration() -> None:
    command = [program("haproxy"), "-c", "-f", str(CONFIGS / "haproxy.cfg")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr


# The name server


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
    return struct.pack("!6H", 77, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!2H", kind, 1)


def test_a_name_has_all_its_addresses_and_others_do_not_exist() -> None:
    found = answer(query("Server"), "server", ["127.0.0.2", "127.0.0.3"])
    assert struct.unpack_from("!6H", found) == (77, 0x8580, 1, 2, 0, 0)
    assert found.endswith(b"\x7f\0\0\x03")
    assert struct.unpack_from("!6H", answer(query("server", kind=28), "server", ["127.0.0.2"]))[3] == 0
    assert struct.unpack_from("!6H", answer(query("other"), "server", ["127.0.0.2"]))[1] & 15 == 3


@pytest.mark.parametrize(
    "junk", [b"", b"x" * 11, query("server")[:-3], query("server").replace(b"\0\1\0\0", b"\0\2\0\0", 1)]
)
def test_junk_is_no_query(junk: bytes) -> None:
    with pytest.raises(ValueError, match=r"quer|question"):
        answer(junk, "server", ["127.0.0.2"])


async def test_the_name_server_answers_after_junk() -> None:
    async with name_server("server", ["127.0.0.2"]) as address:
        host, port = address.split(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(10)
            client.connect((host, int(port)))
            client.send(b"junk")
            client.send(query("server"))
            assert (await asyncio.to_thread(client.recv, 512)).endswith(b"\x7f\0\0\x02")


# The accounts of clients

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
EVENT = b'data: {"choices": [{"text": "yes"}]}\n\n'


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[tuple[Traffic, httpx.AsyncClient, list[int]]]:
    """A server that gives one of the answers to each connection, then closes it. The list: sizes of bodies."""
    given, sizes = iter(answers), []

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        sizes.append(len(await reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower())[1]))))
        writer.write(next(given))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer_once, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, httpx.AsyncClient(base_url=url, timeout=10) as client:
        yield Traffic(url, "m", num_clients=1, max_tokens=2), client, sizes


STREAM, WHOLE, LARGE = 0, 1, 7  # numbers of requests of these kinds; the large one is not streamed


async def test_whole_answers_are_answered() -> None:
    whole = HEAD + b'{"choices": [{"text": "yes"}]}'
    async with answering(HEAD + EVENT + b"data: [DONE]\n\n", whole, whole) as (traffic, client, sizes):
        for number in (STREAM, WHOLE, LARGE):
            await traffic.send(client, number)
    assert traffic.account.answered == {"stream": 1, "whole": 1, "large": 1}
    assert traffic.account.losses == []
    assert sizes[2] == LARGE_BODY


@pytest.mark.parametrize(
    ("given", "has_begun", "reason"),
    [
        (b"", False, "disconnected"),
        (b"HTTP/1.1 503 No\r\nConnection: close\r\n\r\n{}", False, "status 503"),
        (HEAD, False, r"without \[DONE\]"),
        (HEAD + EVENT, True, r"without \[DONE\]"),
        (HEAD + b'data: {"error": {"message": "broken"}}\n\ndata: [DONE]\n\n', True, "broken"),
        (HEAD + b"data: {\n\ndata: [DONE]\n\n", True, ""),
    ],
)
async def test_other_answers_are_losses_that_had_begun_or_not(given: bytes, has_begun: bool, reason: str) -> None:
    async with answering(given) as (traffic, client, _):
        await traffic.send(client, STREAM)
    [loss] = traffic.account.losses
    assert loss.has_begun == has_begun
    assert re.search(reason, loss.reason)
    assert traffic.account.num_answered == 0


async def test_a_replica_that_answers_with_another_text_has_lost_the_request() -> None:
    first, other = (HEAD + EVENT.replace(b"yes", text) + b"data: [DONE]\n\n" for text in (b"yes", b"no"))
    async with answering(first, first, other) as (traffic, client, _):
        for _ in range(3):
            await traffic.send(client, STREAM)
    assert traffic.account.answered["stream"] == 2
    assert "another text" in traffic.account.losses[0].reason


async def test_a_process_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(4)"]
    process = RolloutProcess("a", command, url="http://127.0.0.1:1/readyz", log=tmp_path / "log", environment={})
    async with httpx.AsyncClient() as client:
        with pytest.raises(RuntimeError, match="a ended with code 4; it printed last:\nno such model"):
            await process.wait_until_ready(client, patience=60)


def test_a_balancer_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    assert main(["--balancer", "haproxy"]) == 2
    assert "apt install haproxy" in capsys.readouterr().err


# All of it


@pytest.mark.slow  # a minute each: three servers, one after the other
@pytest.mark.parametrize(
    "balancer", [pytest.param("haproxy", marks=needs_haproxy), pytest.param("nginx", marks=needs_nginx)]
)
@pytest.mark.timeout(400)
def test_a_rolling_restart_loses_nothing_and_a_kill_only_what_had_begun(balancer: str, tmp_path: Path) -> None:
    assert balancer in BALANCERS
    served = "counting?delay=0.005 --served-model-name tiny --drain-delay 4 --shutdown-timeout 20"
    command = f"{sys.executable} {counting_engine.__file__} {served}"
    options = ["--requests", "600", "--clients", "8", "--model", "tiny", "--command", command]
    assert main(["--balancer", balancer, *options, "--results", str(tmp_path)]) == 0
    [file] = tmp_path.glob("*-rollout.json")
    result = msgspec.json.decode(file.read_bytes(), type=RolloutResult)
    [run] = result.runs
    assert run.rolling_restart.num_sent == sum(run.rolling_restart.answered.values()) >= 600
    assert [restart.exit_code for restart in run.restarts] == [0, 0, 0]
    assert run.kill.num_sent == sum(run.kill.answered.values()) + run.kill.num_lost
