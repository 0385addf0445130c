"""What happens to every request around the routes."""

import asyncio
import logging
import re
import socket

import httpx
import pytest

from server.app import create_app
from tests.support.server_world import wait_until

LIMIT = 2000
JSON = {"Content-Type": "application/json"}
BODY = {"model": "tiny", "prompt": "a secret prompt", "max_tokens": 2}


@pytest.fixture(scope="module")
def operation(operate):
    with operate({"limits": {"max_body_bytes": LIMIT}}) as operation:
        operation.engine.say("yes")
        yield operation


@pytest.fixture(scope="module")
def client(operation):
    with httpx.Client(base_url=operation.url) as client:
        yield client


def padded(size: int) -> bytes:
    """A completion request of so many bytes."""
    head = b'{"model": "tiny", "prompt": "a", "max_tokens": 2'
    return head + b" " * (size - len(head) - 1) + b"}"


def test_the_caller_s_request_id_is_echoed_on_every_answer(client):
    for path in ("/v1/models", "/livez", "/nowhere", "/metrics"):
        assert client.get(path, headers={"X-Request-Id": "abc-1.2:3"}).headers.get_list("x-request-id") == ["abc-1.2:3"]
    response = client.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine"})
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["id"] == "cmpl-mine"


@pytest.mark.parametrize("given", [None, "", "a b", "é".encode(), "x" * 129, "a;b", 'a"b', "<script>"])
def test_ids_that_cannot_be_used_are_replaced(client, given):
    headers = {} if given is None else {"X-Request-Id": given}
    ids = {client.get("/livez", headers=headers).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


def test_the_longest_usable_id_is_used(client):
    assert client.get("/livez", headers={"X-Request-Id": "x" * 128}).headers["x-request-id"] == "x" * 128


def test_a_body_at_the_limit_is_read_and_one_byte_more_is_not(client):
    assert client.post("/v1/completions", content=padded(LIMIT), headers=JSON).status_code == 200
    assert client.post("/v1/completions", content=padded(LIMIT + 1), headers=JSON).status_code == 413


def test_the_limit_holds_for_bodies_of_unknown_length(client):
    def chunks(size: int):
        body = padded(size)
        yield from (body[start : start + 100] for start in range(0, size, 100))

    assert client.post("/v1/completions", content=chunks(LIMIT), headers=JSON).status_code == 200
    assert client.post("/v1/completions", content=chunks(LIMIT + 1), headers=JSON).status_code == 413


def test_an_endless_body_is_cut_off(operation):
    host, port = operation.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(chunk * 50_000)


def test_a_declared_length_over_the_limit_is_refused_before_the_body_is_sent(operation):
    answer = operation.raw(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n")
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert b"connection: close" in answer.lower()


def test_a_key_is_asked_for_before_the_body_is_looked_at(operate):
    with operate({"server": {"api_keys": ["key"]}, "limits": {"max_body_bytes": 10}}) as operation:
        assert httpx.post(operation.url + "/v1/completions", content=b"x" * 100).status_code == 401


def access_lines(caplog) -> list[str]:
    """At least one: a line is logged after the answer, which may be here sooner."""

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "peregrine.access"]

    wait_until(lambda: bool(lines()))
    return lines()


def test_one_line_is_logged_per_request_without_what_users_wrote(operation, client, caplog):
    caplog.set_level(logging.INFO, logger="peregrine.access")
    client.post(
        "/v1/completions?token=hidden", json=BODY, headers={"X-Request-Id": "logged", "Authorization": "Bearer k"}
    )
    client.get("/readyz")
    [line] = access_lines(caplog)
    fields = dict(part.split("=", 1) for part in line.split())
    assert (fields["id"], fields["method"], fields["path"]) == ("logged", "POST", "/v1/completions")
    assert (fields["status"], fields["complete"]) == ("200", "yes")
    assert int(fields["bytes"]) > 100
    assert 0 <= float(fields["first_byte_seconds"]) <= float(fields["seconds"])
    assert (fields["outcome"], fields["output_tokens"]) == ("length", "2")
    assert int(fields["prompt_tokens"]) > 0
    assert all("secret" not in record.getMessage() and "hidden" not in record.getMessage() for record in caplog.records)


def test_a_path_cannot_forge_a_log_line(operation, client, caplog):
    caplog.set_level(logging.INFO, logger="peregrine.access")
    operation.raw(b"GET /a%0aid=forged HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    [line] = access_lines(caplog)
    assert "\n" not in line
    assert "path=/a%0aid=forged " in line


def test_an_error_in_the_middle_of_an_answer_breaks_the_connection(operate, caplog):
    from fastapi.responses import StreamingResponse

    with operate() as operation:

        async def numbers():
            yield b"1\n"
            raise RuntimeError("in the middle")

        @operation.app.get("/broken")
        async def broken() -> StreamingResponse:
            return StreamingResponse(numbers())

        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(operation.url + "/broken")
        assert httpx.get(operation.url + "/livez").status_code == 200


def test_strict_mode_refuses_unknown_fields_and_else_a_header_names_them(operate, client):
    response = client.post("/v1/completions", json=BODY | {"foo": 1})
    assert (response.status_code, response.headers["x-ignored-fields"]) == (200, "foo")
    with operate({"server": {"strict": True}}) as operation:
        operation.engine.say("yes")
        assert httpx.post(operation.url + "/v1/completions", json=BODY | {"foo": 1}).status_code == 400
        assert httpx.post(operation.url + "/v1/completions", json=BODY).status_code == 200


def test_the_openapi_document_has_every_route_and_no_stray_error_schema(client):
    document = client.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/metrics"} <= set(document["paths"])
    operations = [each for path in document["paths"].values() for each in path.values()]
    names = [each["operationId"] for each in operations]
    assert len(names) == len(set(names))
    assert all("422" not in each["responses"] for each in operations)


def test_a_refused_request_counts_once_and_the_totals_add_up(operate):
    with operate() as operation:
        operation.engine.say("yes")
        url = operation.url + "/v1/completions"
        for body in (BODY, BODY | {"model": "other"}, BODY | {"n": 129}, {"model": "tiny"}):
            httpx.post(url, json=body)
        httpx.post(url, content=b"{")
        operation.call(operation.state.refuse_requests)
        httpx.post(url, json=BODY)
        text = httpx.get(operation.url + "/metrics").text
        ends = re.findall(r'requests_total\{.*outcome="(\w+)",status="(\d+)"\} (\S+)', text)
        assert {(outcome, status): float(count) for outcome, status, count in ends if float(count)} == {
            ("length", "200"): 1, ("invalid", "400"): 3, ("invalid", "404"): 1, ("rejected", "503"): 1,
        }  # fmt: skip
        assert 'requests_received_total{model_name="tiny"} 6.0' in text


def test_a_full_queue_is_429_over_http_at_the_limit_and_one_past_it(operate):
    with operate({"limits": {"max_queued_requests": 3}}) as operation:
        operation.engine.say("yes")
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
        operation.engine.num_waiting = 2
        assert httpx.post(operation.url + "/v1/completions", json=body).status_code == 200
        operation.engine.num_waiting = 3
        refused = httpx.post(operation.url + "/v1/completions", json=body)
        assert refused.status_code == 429
        assert refused.headers["x-should-retry"] == "true"
        assert int(refused.headers["retry-after"]) >= 1
        assert int(refused.headers["retry-after-ms"]) >= 1
        metrics = httpx.get(operation.url + "/metrics").text
        assert 'requests_total{model_name="tiny",outcome="rejected",status="429"} 1.0' in metrics


def test_the_engine_is_stopped_with_the_application(operate):
    with operate() as operation:
        engine = operation.engine
        assert not engine.was_stopped
    assert engine.was_stopped


def test_many_applications_live_beside_each_other(operate):
    with operate() as first, operate() as second:
        first.engine.say("yes")
        httpx.post(first.url + "/v1/completions", json=BODY)
        assert 'requests_received_total{model_name="tiny"} 1.0' in httpx.get(first.url + "/metrics").text
        assert 'requests_received_total{model_name="tiny"} 0.0' in httpx.get(second.url + "/metrics").text


def test_the_application_is_made_without_a_running_loop(operation):
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    app = create_app(operation.state.config, make_engine=lambda config, observer: operation.engine)
    assert app.state.server.engine is operation.engine
    assert not app.state.server.is_ready
