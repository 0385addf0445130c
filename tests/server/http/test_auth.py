"""Keys: what is open is listed, all else is closed, and no spelling of a path gets around it."""

import threading
import time

import httpx
import pytest

from server.http.auth import PUBLIC_PATHS, ApiKeys

KEYS = {"server": {"api_keys": ["key-one", "key-two"]}}
GOOD = {"Authorization": "Bearer key-two"}


def paths_of(operation) -> set[str]:
    return set(httpx.get(operation.url + "/openapi.json", headers=GOOD).json()["paths"])


def test_without_keys_nothing_is_closed(operate):
    with operate() as operation:
        assert httpx.get(operation.url + "/v1/models").status_code == 200


def test_every_route_needs_a_key_but_the_probes(operate):
    with operate(KEYS) as operation:
        paths = paths_of(operation) | {
            "/redoc",
            "/openapi.json",
            "/no/such/route",
            "/v1/tokenize",
            "/static",
            "/docs/x",
        }
        assert len(paths) > 15
        client = httpx.Client(base_url=operation.url)
        for path in paths - PUBLIC_PATHS:
            for method in ("GET", "POST", "DELETE", "PUT", "OPTIONS", "HEAD"):
                response = client.request(method, path)
                assert response.status_code == 401, (method, path)
                assert response.headers["www-authenticate"] == "Bearer"
        for path in PUBLIC_PATHS:
            assert client.get(path).status_code == 200
        client.close()


def test_a_key_opens_and_a_wrong_one_does_not(operate):
    with operate(KEYS) as operation:
        url = operation.url + "/v1/models"
        assert httpx.get(url, headers=GOOD).status_code == 200
        assert httpx.get(url, headers={"Authorization": "bearer  key-one"}).status_code == 200
        wrong = ["", "Bearer", "Bearer key", "Bearer key-twoo", "key-two", "Basic key-two", "Bearer KEY-TWO"]
        wrong += ["Bearer key-one,key-two", "Bearer key-one key-two", "Bearer ['key-one', 'key-two']"]
        with httpx.Client() as client:
            for value in wrong:
                assert client.get(url, headers={"Authorization": value}).status_code == 401, value
        assert httpx.get(url, params={"api_key": "key-two"}).status_code == 401


def test_metrics_are_open_only_if_configured(operate):
    with operate(KEYS) as operation:
        assert httpx.get(operation.url + "/metrics").status_code == 401
        assert httpx.get(operation.url + "/metrics", headers=GOOD).status_code == 200
    with operate({**KEYS, "metrics": {"public": True}}) as operation:
        assert httpx.get(operation.url + "/metrics").status_code == 200
        assert httpx.get(operation.url + "//metrics/").status_code == 200
        assert httpx.get(operation.url + "/metrics/x").status_code == 401


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models", "/v1//models", "/v1/models/", "/V1/MODELS", "/livez/../v1/models", "/livez/..%2fv1/models",
        "/livez%2f..%2fv1/models", "/%6civez/../v1/models", "/livez;/v1/models", "/livez%00/v1/models", "/./v1/models",
        "/v1/models?path=/livez", "/v1/models#/livez", "/v1%2fmodels", "/%76%31/models", "/livez/x", "/LIVEZ",
        "http://livez/v1/models", "http://localhost/livez/../v1/models", "/v1/models%3f/livez", "/livez%20", "*",
        "/static/../v1/models", "/docs/../v1/models", "/static//v1/models", "/docs%2f..%2fv1/models", "/static/",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "extra", ["Host: x/livez", "Host: localhost", "Host: x\r\nX-Forwarded-Prefix: /livez", "X-A: b"]
)
def test_no_spelling_of_a_path_gets_around_the_key(shared_operation, target, extra):
    request = f"GET {target} HTTP/1.1\r\n{extra}\r\nX-Original-URL: /livez\r\nConnection: close\r\n\r\n"
    answer = shared_operation.raw(request.encode())
    status = answer.split(b" ", 2)[1]
    assert status in (b"401", b"400"), answer[:200]
    assert b'"object"' not in answer


@pytest.fixture(scope="module")
def shared_operation(operate):
    """One server for the many spellings."""
    with operate(KEYS) as operation:
        yield operation


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "get", "OPTIONS", "TRACE", "FOO"])
def test_no_method_gets_around_the_key(shared_operation, method):
    answer = shared_operation.raw(f"{method} /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b" ", 2)[1] in (b"401", b"400"), answer[:200]


def test_two_authorization_headers_are_one_too_many(shared_operation):
    both = "Authorization: Bearer wrong\r\nAuthorization: Bearer key-one\r\n"
    answer = shared_operation.raw(f"GET /v1/models HTTP/1.1\r\nHost: a\r\n{both}Connection: close\r\n\r\n".encode())
    assert answer.split(b" ", 2)[1] == b"401"


def test_each_key_has_a_salt_of_its_own_that_does_not_show_the_key():
    keys = [f"key-{index}" for index in range(50)]
    api_keys = ApiKeys(keys)
    tenants = [api_keys.tenant_of(key.encode()) for key in keys]
    assert len(set(tenants)) == 50
    assert tenants == [api_keys.tenant_of(key.encode()) for key in keys]
    assert api_keys.tenant_of(b"key-50") is None
    assert api_keys.tenant_of(b"\xff\x00") is None
    assert ApiKeys(keys).tenant_of(b"key-0") != tenants[0]  # differs by process, so it cannot be looked up


def test_requests_with_different_keys_do_not_share_cached_prefixes(operate):
    with operate(KEYS) as operation:
        operation.engine.say("yes")
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
        for key in ("key-one", "key-two", "key-one"):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.post(operation.url + "/v1/completions", json=body, headers=headers).status_code == 200
        first, second, third = (request.cache_salt for request in operation.engine.requests)
        assert first == third != second


def test_a_request_belongs_to_the_key_that_it_came_with(operate):
    """Equal ids of two keys are two requests, and neither key ends the other's."""
    with operate(KEYS) as operation:
        operation.engine._answers.delay = 0.05
        answers: dict[str, httpx.Response] = {}

        def ask(key: str) -> None:
            headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "mine"}
            body = {"model": "tiny", "prompt": "a", "max_tokens": 100, "stop_token_ids": [1]}
            answers[key] = httpx.post(operation.url + "/v1/completions", json=body, headers=headers, timeout=60)

        threads = [threading.Thread(target=ask, args=(key,)) for key in ("key-one", "key-two")]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while len(operation.engine._answers.running) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ids = [request.request_id for request in operation.engine.requests]
        assert len(set(ids)) == 2, "in the engine too"
        url = operation.url + "/v1/requests/"
        assert httpx.delete(url + "somebody-else-s", headers=GOOD).status_code == 404
        assert httpx.delete(url + "mine", headers=GOOD).status_code == 200
        threads[1].join()
        assert httpx.delete(url + "mine", headers=GOOD).status_code == 404, "the other one is not there for this key"
        threads[0].join()
        assert answers["key-two"].status_code == 409
        assert answers["key-one"].status_code == 200
        assert answers["key-one"].json()["usage"]["completion_tokens"] == 100
