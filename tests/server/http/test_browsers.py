"""What browsers and careless clients send before, beside and around a request."""

import httpx
import pytest

from server.config import Config

ORIGIN = "https://chat.example"
KEYS = {"api_keys": ["key-one"], "cors_origins": [ORIGIN]}
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
}


def test_a_preflight_needs_no_key_and_allows_the_configured_origin_alone(operate):
    with operate({"server": KEYS}) as operation:
        url = operation.url + "/v1/chat/completions"
        answer = httpx.options(url, headers=PREFLIGHT)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
        other = httpx.options(url, headers={**PREFLIGHT, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        assert other.status_code == 400
        assert other.json()["error"]["code"] == "origin_not_allowed"
        assert "evil.example" in other.json()["error"]["message"]
        put = httpx.options(url, headers={**PREFLIGHT, "Access-Control-Request-Method": "PUT"})
        assert (put.status_code, put.headers["access-control-allow-origin"]) == (400, ORIGIN)


def test_any_page_may_call_where_every_origin_is_allowed(operate):
    with operate({"server": {**KEYS, "cors_origins": "*"}}) as operation:
        answer = httpx.options(operation.url + "/v1/models", headers=PREFLIGHT)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


@pytest.mark.parametrize("origin", ["https://chat.example/", "chat.example", "https://chat.example/app", ""])
def test_what_no_browser_sends_as_an_origin_is_refused_at_the_start(origin):
    with pytest.raises(ValueError, match="cors_origins"):
        Config.model_validate({"server": {"cors_origins": [origin]}})


@pytest.mark.parametrize("key", ["key-one", "wrong"])
def test_answers_and_refusals_can_be_read_by_the_page_that_asked(operate, key):
    with operate({"server": KEYS}) as operation:
        headers = {"Origin": ORIGIN, "Authorization": f"Bearer {key}"}
        answer = httpx.post(operation.url + "/v1/completions", json={"model": "tiny", "prompt": "a"}, headers=headers)
        assert answer.status_code == (200 if key == "key-one" else 401)
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_without_the_setting_no_page_may_call(operate):
    with operate() as operation:
        answer = httpx.options(operation.url + "/v1/chat/completions", headers=PREFLIGHT)
        assert answer.status_code == 405
        answer = httpx.get(operation.url + "/v1/models", headers={"Origin": ORIGIN})
        assert "access-control-allow-origin" not in answer.headers


def test_doubled_and_trailing_slashes_find_their_route(operate):
    with operate() as operation:
        for path in ("/v1/models/", "//v1/models", "/v1//models//", "/livez/", "//readyz", "/metrics/", "/version//"):
            assert httpx.get(operation.url + path).status_code == 200, path
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
        assert httpx.post(operation.url + "//v1/completions/", json=body).status_code == 200
        for path in ("//v1/models/tiny", "/v1//models///tiny", "/v1/models/tiny/", "/v1/models/org/other-name//"):
            assert httpx.get(operation.url + path).status_code == 200, path
        assert httpx.get(operation.url + "/v1/models/ti/ny").status_code == 404
        assert httpx.get(operation.url + "/no/such/route").status_code == 404


def test_probes_are_open_under_all_their_names(operate):
    with operate({"server": {"api_keys": ["k"]}}) as operation:
        for path in ("/livez", "/readyz", "/startupz", "/health", "/ping", "/health/"):
            assert httpx.get(operation.url + path).status_code == 200
        assert httpx.post(operation.url + "/ping").status_code == 200
        assert httpx.get(operation.url + "/version").status_code == 401
