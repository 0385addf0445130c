"""What comes over a connection before there is a request to look at: read in any pieces, bounded in size and time."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import socket
import time
import zlib

import httpx
import pytest

LIMIT = 20_000
JSON = {"Content-Type": "application/json"}
BODY = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 2}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(scope="module")
def operation(operate):
    with operate({"limits": {"max_body_bytes": LIMIT}}) as operation:
        operation.engine.say("yes")
        yield operation


@contextlib.contextmanager
def connected(operation):
    host, port = operation.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        yield connection


def answers(connection: socket.socket, count: int) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, headers and body of so many answers with a Content-Length; fewer if the connection ends."""
    found, data = [], b""
    while len(found) < count:
        head, end, rest = data.partition(b"\r\n\r\n")
        if end:
            first, *lines = head.decode().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            length = int(headers["content-length"])
            if len(rest) >= length:
                found.append((int(first.split()[1]), headers, rest[:length]))
                data = rest[length:]
                continue
        try:
            chunk = connection.recv(65536)
        except ConnectionResetError:
            break
        if not chunk:
            break
        data += chunk
    return found


def ends(connection: socket.socket) -> bool:
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def error_of(answer: tuple[int, dict[str, str], bytes]) -> dict[str, str]:
    return json.loads(answer[2])["error"]


# In any pieces


def chunked(body: bytes, rng: random.Random) -> bytes:
    parts = []
    while body:
        size = rng.randint(1, len(body))
        parts.append(b"%x%s\r\n%s\r\n" % (size, rng.choice([b"", b";a=b"]), body[:size]))
        body = body[size:]
    return b"".join(parts) + b"0\r\n" + rng.choice([b"", b"X-Trailer: a\r\n"]) + b"\r\n"


@pytest.mark.parametrize("seed", range(10))
def test_requests_are_answered_in_order_however_they_are_cut_and_queued(operation, seed):
    rng = random.Random(seed)
    data, expected = b"", []
    for number in range(12):
        kind = rng.choice(["get", "length", "missing", "upgrade"] + ["chunked"] * (number == 11))
        if kind == "length":
            data += POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
        elif kind == "chunked":
            data += CHUNKED + chunked(BODY, rng)
        elif kind == "upgrade":
            data += GET[:-2] + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"
        else:
            data += GET if kind == "get" else b"\r\n" + GET.replace(b"livez", b"nowhere")
        expected.append(404 if kind == "missing" else 200)
    cuts = sorted(rng.sample(range(1, len(data)), rng.choice([0, 3, 60])))
    with connected(operation) as connection:
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            connection.sendall(data[start:end])
        assert [status for status, _, _ in answers(connection, len(expected))] == expected


def test_a_request_behind_a_chunked_body_in_one_piece_is_answered_or_the_connection_says_that_it_ends(operation):
    with connected(operation) as connection:
        connection.sendall((CHUNKED + chunked(BODY, random.Random(0))) * 3)
        found = answers(connection, 3)
        assert all(status == 200 for status, _, _ in found)
        assert len(found) == 3 or found[-1][1]["connection"] == "close"


@pytest.mark.parametrize("seed", range(30))
def test_no_bytes_bring_a_5xx_or_stop_the_server(operation, seed):
    rng = random.Random(seed)
    parts = [
        GET, POST, CHUNKED, BODY, b"\r\n", b"\n", b"0\r\n\r\n", b"5\r\nabcde\r\n", b"Content-Length: 5\r\n", b"-1\r\n",
        b"Host: b\r\n", b"Transfer-Encoding: chunked\r\n", b"X: \xff\xfe\r\n", b"GET /%ff%00 HTTP/1.0\r\n",
        b"PRI * HTTP/2.0", b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"OPTIONS * HTTP/1.1\r\n", b"\x00",
        b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"ffffffffffffffffff\r\n", b"CONNECT a:1 HTTP/1.1\r\n",
        bytes(rng.randbytes(50)),
        b"Content-Encoding: gzip\r\n", b"Content-Encoding: gzip, br\r\n", b"Content-Length: 99999999999999999999\r\n",
    ]  # fmt: skip
    data = rng.choice([GET, POST, CHUNKED, b""]) + b"".join(rng.choices(parts, k=rng.randint(1, 12)))
    with connected(operation) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
    assert b"HTTP/1.1 5" not in received, data
    assert httpx.get(operation.url + "/livez").status_code == 200


# Heads


@pytest.mark.parametrize(
    ("version", "hosts", "status"),
    [
        ("1.1", [], 400), ("1.1", ["a"], 200), ("1.1", ["a", "a"], 400), ("1.1", ["a", "b"], 400), ("1.0", [], 200),
        ("1.0", ["a", "b"], 400), ("1.1", ["a b"], 400), ("1.1", ["a/b"], 400), ("1.1", ["[::1]:80"], 200),
        ("1.1", [""], 200),
    ],
)  # fmt: skip
def test_a_request_names_one_host(operation, version, hosts, status):
    lines = "".join(f"Host: {host}\r\n" for host in hosts)
    with connected(operation) as connection:
        connection.sendall(f"GET /livez HTTP/{version}\r\n{lines}\r\n".encode())
        [answer] = answers(connection, 1)
        assert answer[0] == status
        if status == 400:
            assert error_of(answer)["code"] == "invalid_host"


@pytest.mark.parametrize("coding", ["gzip, chunked", "chunked, chunked", "chunked\r\nTransfer-Encoding: chunked"])
def test_other_transfer_encodings_are_400(operation, coding):
    with connected(operation) as connection:
        connection.sendall(POST + f"Transfer-Encoding: {coding}\r\n\r\n0\r\n\r\n".encode())
        assert answers(connection, 1)[0][0] == 400


def test_headers_are_counted(operation):
    with connected(operation) as connection:
        connection.sendall(GET[:-2] + b"a:\r\n" * 127 + b"\r\n")
        assert answers(connection, 1)[0][0] == 200
        connection.sendall(GET[:-2] + b"a:\r\n" * 128 + b"\r\n")
        assert answers(connection, 1)[0][0] == 431


def test_empty_lines_before_a_request_are_skipped_while_they_are_few(operation):
    with connected(operation) as connection:
        connection.sendall(b"\r\n" * 5 + GET)
        assert answers(connection, 1)[0][0] == 200
        connection.sendall(b"\r\n" * 1000 + GET)
        assert answers(connection, 1)[0][0] == 431


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_body_in_many_small_chunks_is_read(operation, size):
    body = BODY[:-1] + b" " * (LIMIT - len(BODY)) + b"}"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[i : i + size] for i in range(0, LIMIT, size)))
    with connected(operation) as connection:
        for _ in range(2):
            connection.sendall(CHUNKED + chunks + b"0\r\n\r\n")
            assert answers(connection, 1)[0][0] == 200


def test_a_trailer_is_no_header(operate):
    with operate({"server": {"api_keys": ["key"]}}) as operation, connected(operation) as connection:
        connection.sendall(CHUNKED + b"2\r\n{}\r\n0\r\nAuthorization: Bearer key\r\nX-Request-Id: forged\r\n\r\n")
        [(status, headers, _)] = answers(connection, 1)
        assert status == 401
        assert headers["x-request-id"] != "forged"


@pytest.mark.parametrize("endless", [b"0\r\nX: ", b"2;", b"1;aaaaaaaaaaaaaaa\r\n \r\n", b"0\r\nX: a\r\n"], ids=repr)
def test_what_surrounds_the_chunks_of_a_body_is_bounded(operation, endless):
    with connected(operation) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(CHUNKED + endless)
            for _ in range(100):
                connection.sendall((endless.removeprefix(b"0\r\n") if b"\r\n" in endless else b"x") * 5000)
        assert [status for status, _, _ in answers(connection, 1)] in ([431], [413], [400])


def test_answers_to_http_1_0_have_no_chunks_and_end_with_the_connection(operation):
    body = BODY.replace(b"}", b', "stream": true}')
    old = POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with connected(operation) as connection:
        connection.sendall(old)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    head, _, events = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert all(line.startswith((b"data: ", b":")) for line in events.split(b"\n") if line)
    assert events.endswith(b"data: [DONE]\n\n")


# Times


def test_a_head_that_does_not_come_to_its_end_is_408_and_an_idle_connection_is_closed(operate):
    with operate({"operation": {"head_timeout": 0.3}}) as operation:
        with connected(operation) as connection:
            connection.sendall(GET[:20])
            [answer] = answers(connection, 1)
            assert (answer[0], error_of(answer)["code"]) == (408, "request_timeout")
            assert ends(connection)
        with connected(operation) as connection:
            assert answers(connection, 1) == []
        with connected(operation) as connection:  # bytes that begin no request keep nothing open
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    connection.sendall(b"\r\n")
                    time.sleep(0.01)
            assert answers(connection, 1)[0][0] == 408


def test_the_next_request_of_a_connection_has_its_own_time(operate):
    with operate({"operation": {"head_timeout": 0.3}}) as operation, connected(operation) as connection:
        for _ in range(2):
            connection.sendall(GET)
            assert answers(connection, 1)[0][0] == 200
            time.sleep(0.5)
        connection.sendall(GET[:-1])
        assert answers(connection, 1)[0][0] == 408


def test_connections_that_idle_after_an_answer_are_closed(operate):
    with operate({"operation": {"keep_alive_timeout": 1}}) as operation, connected(operation) as connection:
        connection.sendall(GET)
        assert answers(connection, 1)[0][0] == 200
        assert ends(connection)


def test_a_body_that_does_not_come_to_its_end_is_408(operate):
    with operate({"operation": {"body_timeout": 0.3}}) as operation, connected(operation) as connection:
        connection.sendall(POST + b"Content-Length: 100\r\n\r\n{")
        [answer] = answers(connection, 1)
        assert (answer[0], error_of(answer)["code"]) == (408, "request_timeout")
        assert answer[1]["x-request-id"]
        assert ends(connection)


def test_the_rest_of_a_refused_body_is_read_for_so_long_and_dropped(operate):
    settings = {"server": {"api_keys": ["key"]}, "operation": {"body_timeout": 0.5}}
    with operate(settings) as operation:
        with connected(operation) as connection:
            connection.sendall(POST + b"Content-Length: 100000\r\n\r\n")
            assert answers(connection, 1)[0][0] == 401
            connection.sendall(b"x" * 100_000 + GET)  # the connection goes on where all of it came
            assert answers(connection, 1)[0][0] == 200
        with connected(operation) as connection:
            connection.sendall(POST + b"Content-Length: 100000\r\n\r\n")
            assert answers(connection, 1)[0][0] == 401
            assert ends(connection)


def test_a_client_that_takes_nothing_of_its_answer_is_left(operate):
    with operate({"operation": {"send_timeout": 0.3}}) as operation, connected(operation) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises((ConnectionError, TimeoutError)):  # noqa: PT012
            for _ in range(100_000):
                connection.sendall(GET.replace(b"livez", b"openapi.json"))
        assert httpx.get(operation.url + "/livez").status_code == 200


# Room


def test_beyond_the_limit_the_connection_that_has_waited_longest_is_closed(operate):
    with operate({"operation": {"max_connections": 3}}) as operation, contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(connected(operation)) for _ in range(3))
        for connection in (second, third, first):  # the order in which they become idle counts
            connection.sendall(GET)
            assert answers(connection, 1)[0][0] == 200
        assert httpx.get(operation.url + "/livez").status_code == 200
        assert ends(second)
        third.sendall(GET)
        assert answers(third, 1)[0][0] == 200


def test_connections_that_are_all_busy_keep_their_places_and_a_further_one_is_503(operate):
    with operate({"operation": {"max_connections": 2}}) as operation, contextlib.ExitStack() as stack:
        operation.engine.say("yes")
        operation.engine._answers.first_delay = 1.0
        busy = [stack.enter_context(connected(operation)) for _ in range(2)]
        for connection in busy:
            connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        time.sleep(0.3)
        with connected(operation) as connection:
            [answer] = answers(connection, 1)
            assert (answer[0], error_of(answer)["code"]) == (503, "too_many_connections")
            assert answer[1]["retry-after"]
        assert [answers(connection, 1)[0][0] for connection in busy] == [200, 200]


def test_unfinished_heads_make_room_for_whole_ones(operate):
    with operate({"operation": {"max_total_head_bytes": 10_000}}) as operation, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(operation)) for _ in range(10)]
        for connection in slow:
            connection.sendall(GET[:-2] + b"X: " + b"x" * 3000)
        assert answers(slow[0], 1)[0][0] == 408
        assert httpx.get(operation.url + "/livez").status_code == 200
        slow[-1].sendall(b"\r\n\r\n")
        assert answers(slow[-1], 1)[0][0] == 200


def test_bodies_share_a_budget_and_what_is_answered_gives_its_part_back(operate):
    limits = {"limits": {"max_body_bytes": 100_000}, "operation": {"max_total_body_bytes": 50_000}}
    with operate(limits) as operation, connected(operation) as slow:
        operation.engine.say("yes")
        body = BODY[:-1] + b" " * 60_000 + b"}"
        url = operation.url + "/v1/completions"
        for _ in range(3):  # alone, a body may have all that one may have
            assert httpx.post(url, content=body, headers=JSON).status_code == 200
        slow.sendall(POST + b"Content-Length: 45000\r\n\r\n" + b" " * 40_000)
        operation.call(lambda: None)
        refused = httpx.post(url, content=body, headers=JSON)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["x-should-retry"] == "true"
        assert httpx.post(url, content=BODY, headers=JSON).status_code == 200
        slow.close()
        operation.call(lambda: None)
        assert httpx.post(url, content=body, headers=JSON).status_code == 200
        assert operation.state.body_budget.num_bytes == 0


def test_half_a_body_is_given_up_when_the_server_drains(operate):
    with operate() as operation, connected(operation) as connection:
        connection.sendall(POST + b"Content-Length: 100\r\n\r\n{")
        operation.call(lambda: None)
        operation.call(operation.state.refuse_requests)
        [answer] = answers(connection, 1)
        assert (answer[0], error_of(answer)["code"]) == (503, "draining")


def test_a_body_is_read_only_by_a_route_that_wants_it(operation):
    for method, path, status in [("POST", "/livez", 405), ("POST", "/nowhere", 404), ("GET", "/livez", 200)]:
        with connected(operation) as connection:
            connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n".encode())
            assert answers(connection, 1)[0][0] == status


# Compressed bodies


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("coding", "compress"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("GZIP", gzip.compress), ("deflate", zlib.compress),
     ("deflate", raw_deflate), ("identity", bytes)],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 100, LIMIT])
def test_compressed_bodies_are_read_in_any_pieces(operation, coding, compress, size):
    data = compress(BODY[:-1] + b" " * (LIMIT - len(BODY)) + b"}")
    pieces = (data[start : start + size] for start in range(0, len(data), size))
    headers = JSON | {"Content-Encoding": coding}
    answer = httpx.post(operation.url + "/v1/completions", content=pieces, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("coding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_body_that_grows_beyond_the_limit_is_413(operation, coding, compress):
    for size in (LIMIT + 1, 10 * 2**20):
        headers = JSON | {"Content-Encoding": coding}
        data = compress(b" " * size)
        assert len(data) < LIMIT
        answer = httpx.post(operation.url + "/v1/completions", content=data, headers=headers)
        assert answer.status_code == 413
        assert str(LIMIT) in answer.json()["error"]["message"]


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "gzip, br", "nonsense", "\xe9"])
def test_other_content_encodings_are_415_and_the_answer_names_those_that_are_read(operation, coding):
    headers = JSON | {"Content-Encoding": coding.encode("latin-1")}
    answer = httpx.post(operation.url + "/v1/completions", content=BODY, headers=headers)
    assert answer.status_code == 415
    assert answer.headers["accept-encoding"] == "gzip, deflate"
    assert answer.json()["error"]["code"] == "unsupported_content_encoding"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        BODY,
        gzip.compress(BODY, mtime=0)[:-1],
        gzip.compress(BODY, mtime=0) + b"x",
        gzip.compress(BODY, mtime=0)[:20],
        b"\x1f",
        b"\x1f\x8b",
    ],
)
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_what_is_not_compressed_as_it_says_is_400(operation, data, coding):
    headers = JSON | {"Content-Encoding": coding}
    answer = httpx.post(operation.url + "/v1/completions", content=data, headers=headers)
    assert answer.status_code == 400, answer.text
    assert "body" in answer.json()["error"]["message"]
