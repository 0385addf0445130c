"""Requests for text that no route sees are counted as those that one refuses."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

KEY = "the-key"
GOOD = {"Authorization": f"Bearer {KEY}"}
CONFIG = {"server": {"api_keys": [KEY]}, "metrics": {"public": True}, "limits": {"max_body_bytes": 1000}}
BODY = {"model": "tiny", "prompt": "a"}


def counts(client: httpx.Client) -> tuple[int, dict[tuple[str, str], int]]:
    """Requests that arrived, and those that ended by outcome and status."""
    samples = [s for family in text_string_to_metric_families(client.get("/metrics").text) for s in family.samples]
    received = sum(int(s.value) for s in samples if s.name == "peregrine_requests_received_total")
    ends = {
        (s.labels["outcome"], s.labels["status"]): int(s.value)
        for s in samples
        if s.name == "peregrine_requests_total" and s.value
    }
    return received, ends


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "//v1/completions/"])
def test_requests_without_a_key_are_counted_once(operate, path: str) -> None:
    with operate(CONFIG) as operation, httpx.Client(base_url=operation.url) as client:
        for _ in range(3):
            assert client.post(operation.url + path, json=BODY).status_code == 401
        assert counts(client) == (3, {("invalid", "401"): 3})


def test_a_body_that_says_that_it_is_too_large_is_counted_once(operate) -> None:
    with operate(CONFIG) as operation, httpx.Client(base_url=operation.url, headers=GOOD) as client:
        assert client.post("/v1/completions", json=BODY | {"prompt": "a" * 2000}).status_code == 413
        assert counts(client) == (1, {("invalid", "413"): 1})


def test_what_a_route_refuses_or_answers_is_not_counted_twice(operate) -> None:
    with operate(CONFIG) as operation, httpx.Client(base_url=operation.url, headers=GOOD) as client:
        assert client.post("/v1/completions", json=BODY | {"max_tokens": -1}).status_code == 400
        assert client.post("/v1/completions", json=BODY | {"model": "none"}).status_code == 404
        operation.engine.say("yes")
        assert client.post("/v1/completions", json=BODY).status_code == 200
        received, ends = counts(client)
        assert (received, sum(ends.values())) == (3, 3)
        assert (ends["invalid", "400"], ends["invalid", "404"]) == (1, 1)


def test_requests_for_other_things_are_not_counted(operate) -> None:
    with operate(CONFIG) as operation, httpx.Client(base_url=operation.url) as client:
        for method, path in (
            ("GET", "/v1/completions"),
            ("GET", "/v1/models"),
            ("POST", "/tokenize"),
            ("GET", "/livez"),
        ):
            client.request(method, path)
        assert counts(client) == (0, {})
