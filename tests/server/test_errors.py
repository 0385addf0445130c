"""Every error has the same four fields and says whether to try again, whatever its status, over real HTTP."""

import json
import math
import random

import httpx
import pytest
from fastapi import Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from server.config import OperationConfig
from server.errors import ERRORS, ApiError, bad_request, error_body, error_headers, field_path

MAX_HEAD_BYTES = OperationConfig().max_head_bytes


def check(response: httpx.Response, status: int) -> dict:
    """The error of a response that is an error in every way that clients look at."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-should-retry"] in ("true", "false")
    assert response.headers["x-request-id"]
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
        assert int(response.headers["retry-after-ms"]) >= 1
    return error


class Body(BaseModel):
    number: int
    items: list[dict[str, int]] = []


@pytest.fixture(scope="module")
def broken(operate):
    """A server with routes that fail in every way."""
    with operate({"limits": {"max_body_bytes": 1000}}) as operation:

        @operation.app.get("/raise/{status}")
        async def raise_status(status: int) -> None:
            raise ApiError(status, "")

        @operation.app.get("/http/{status}")
        async def raise_http(status: int) -> None:
            raise HTTPException(status)

        @operation.app.get("/bug")
        async def raise_bug() -> None:
            raise KeyError("a secret of the server")

        @operation.app.post("/typed")
        async def read_typed(body: Body, request: Request) -> None:
            """Never reached in these tests with a wrong body."""

        with httpx.Client(base_url=operation.url) as client:
            yield client


@pytest.mark.parametrize("status", sorted(ERRORS))
def test_every_status_of_the_table_has_the_same_body(broken, status):
    error = check(broken.get(f"/raise/{status}"), status)
    assert error["message"] == ERRORS[status].message
    assert (error["type"], error["code"], error["param"]) == (ERRORS[status].type, ERRORS[status].code, None)


@pytest.mark.parametrize(("raised", "sent"), [(404, 404), (405, 405), (418, 400), (422, 400), (502, 500), (503, 503)])
def test_what_the_framework_raises_has_it_too(broken, raised, sent):
    check(broken.get(f"/http/{raised}"), sent)


def test_a_bug_is_500_with_the_request_s_id_and_no_details(broken):
    response = broken.get("/bug", headers={"X-Request-Id": "mine-1"})
    error = check(response, 500)
    assert response.headers["x-request-id"] == "mine-1"
    assert "mine-1" in error["message"]
    assert "secret" not in response.text
    assert response.headers["x-should-retry"] == "false"


def test_a_route_that_is_not_there_is_404_and_a_wrong_method_405(broken):
    assert "/nowhere" in check(broken.get("/nowhere"), 404)["message"]
    assert "/v1/models " in check(broken.post("/v1/models/"), 405)["message"]
    response = broken.get("/v1/chat/completions")
    error = check(response, 405)
    assert "GET" in error["message"]
    assert response.headers["allow"] == "POST"


def test_a_body_over_the_limit_is_413(broken):
    error = check(broken.post("/v1/completions", content=b"x" * 1001), 413)
    assert "limits.max_body_bytes allows 1000" in error["message"]


def test_an_unknown_model_is_404_with_a_code_of_its_own(broken):
    error = check(broken.post("/v1/completions", json={"model": "gpt-4", "prompt": "a"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"number": "x"}, "number", "valid integer"),
        ({}, "number", "required"),
        ({"number": 1, "items": [{"a": 1}, {"a": "x"}]}, "items[1].a", "valid integer"),
        ([1], None, "JSON object"),
        ("text", None, "JSON object"),
        (None, None, "JSON object"),
    ],
)
def test_validation_errors_are_400_and_name_the_field(broken, body, param, words):
    error = check(broken.post("/typed", json=body), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b"{", b"\xff", b"{'number': 1}", b"", b"[" * 400])
@pytest.mark.parametrize("path", ["/typed", "/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_bytes_that_are_no_json_are_400(broken, path, content):
    response = broken.post(path, content=content, headers={"Content-Type": "application/json"})
    check(response, 400)


def test_several_mistakes_are_counted(broken):
    error = check(broken.post("/typed", json={"items": [{"a": "x"}]}), 400)
    assert "(and 1 more)" in error["message"]


def test_statuses_that_may_be_retried_say_so():
    retried = {status for status in ERRORS if error_headers(ApiError(status, "m"))["x-should-retry"] == "true"}
    assert retried == {408, 429, 503}


def test_retry_after_is_whole_seconds_rounded_up_and_never_zero():
    generator = random.Random(0)
    for seconds in [0.0, 0.0001, 1.0, 1.0001, *(generator.expovariate(0.2) for _ in range(200))]:
        headers = error_headers(ApiError(429, "m", retry_after=seconds))
        assert int(headers["Retry-After"]) == max(1, math.ceil(seconds))
        assert int(headers["retry-after-ms"]) == max(1, math.ceil(seconds * 1000))
    assert "Retry-After" not in error_headers(ApiError(400, "m"))
    assert "Retry-After" in error_headers(ApiError(503, "m"))


def test_what_the_raiser_says_wins_over_the_table():
    error = ApiError(404, "no", type="t", param="p", code="c")
    assert json.dumps(error_body(error)) == '{"error": {"message": "no", "type": "t", "param": "p", "code": "c"}}'
    assert bad_request("no", param="p").status == 400


def test_field_paths_read_like_json():
    assert field_path(["messages", 0, "content", 1, "text"]) == "messages[0].content[1].text"
    assert field_path([0, "a"]) == "[0].a"
    assert field_path([]) == ""


@pytest.mark.parametrize(
    "data", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_http_is_400_with_the_same_body(operate, data):
    with operate() as operation:
        head, _, body = operation.raw(data).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"x-should-retry: false" in head
        assert json.loads(body)["error"]["code"] == "invalid_http"
        assert httpx.get(operation.url + "/livez").status_code == 200


def test_headers_at_the_limit_are_read_and_longer_ones_are_431(operate):
    with operate() as operation:
        start, end = b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: ", b"\r\nConnection: close\r\n\r\n"
        fits = start + b"x" * (MAX_HEAD_BYTES - len(start) - len(end)) + end
        assert operation.raw(fits).startswith(b"HTTP/1.1 200 ")
        for endless in (
            start + b"x" * MAX_HEAD_BYTES,
            b"GET /" + b"x" * MAX_HEAD_BYTES,
            start + b"x\r\nX-B: b" * 10_000,
        ):
            head, _, body = operation.raw(endless).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 431 "), endless[:50]
            assert json.loads(body)["error"]["code"] == "headers_too_large"
