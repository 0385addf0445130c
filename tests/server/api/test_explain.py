"""GET /v1/requests/{id}/explain and GET /v1/server/trace over HTTP: who may see what, and what is there."""

from __future__ import annotations

import httpx
import pytest

KEYS = {"server": {"api_keys": ["key-one", "key-two"], "operator_keys": ["operator"]}}
COMPLETION = {"model": "tiny", "prompt": "hello world", "max_tokens": 5}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_a_request_is_explained_by_either_of_its_ids(operate, streamed):
    with operate() as operation, httpx.Client(base_url=operation.url) as client:
        body = COMPLETION | {"stream": streamed}
        response = client.post("/v1/completions", json=body, headers={"X-Request-Id": "team/42"})
        assert response.status_code == 200
        for name in ("team/42", "cmpl-team/42"):
            explained = client.get(f"/v1/requests/{name}/explain")
            assert explained.status_code == 200
            assert explained.headers["cache-control"] == "no-store"
            told = explained.json()
            assert (told["id"], told["request_id"]) == ("cmpl-team/42", "team/42")
            assert (told["state"], told["outcome"], told["status"]) == ("ended", "length", 200)
            assert told["output"]["tokens"] == 5
            assert told["prompt"]["tokens"] == told["prompt"]["computed_tokens"] > 0
            assert told["sentence"].startswith("TTFT ")
            assert "hello" not in explained.text, "no text of a request is repeated"


def test_an_id_in_the_body_counts_too(operate):
    with operate() as operation:
        httpx.post(operation.url + "/v1/completions", json=COMPLETION | {"request_id": "of-the-body"})
        assert httpx.get(operation.url + "/v1/requests/of-the-body/explain").status_code == 200


def test_what_was_refused_is_explained_as_well(operate):
    with operate({"limits": {"max_prompts": 1}}) as operation:
        body, headers = COMPLETION | {"prompt": ["a", "b"]}, {"X-Request-Id": "two"}
        assert httpx.post(operation.url + "/v1/completions", json=body, headers=headers).status_code == 400
        told = httpx.get(operation.url + "/v1/requests/two/explain").json()
        assert (told["state"], told["status"], told["outcome"]) == ("refused", 400, "invalid")
        assert told["error"]
        assert told["error"] in told["sentence"]


def test_a_long_error_is_remembered_in_part(operate):
    with operate({"server": {"strict": True}}) as operation:
        body, headers = COMPLETION | {f"unknown_{index}" * 5: 1 for index in range(500)}, {"X-Request-Id": "long"}
        refused = httpx.post(operation.url + "/v1/completions", json=body, headers=headers)
        assert refused.status_code == 400
        told = httpx.get(operation.url + "/v1/requests/long/explain").json()
        assert 0 < len(told["error"]) <= 1000
        assert refused.json()["error"]["message"].startswith(told["error"])


def test_an_unknown_id_is_404_with_what_was_asked_for(operate):
    with operate() as operation:
        response = httpx.get(operation.url + "/v1/requests/nobody/explain")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "request_not_found"
        assert "'nobody'" in response.json()["error"]["message"]


def test_a_key_sees_its_own_requests_and_an_operator_s_key_all(operate):
    with operate(KEYS) as operation, httpx.Client(base_url=operation.url) as client:
        for key in ("key-one", "key-two"):
            headers = bearer(key) | {"X-Request-Id": f"of-{key}"}
            assert client.post("/v1/completions", json=COMPLETION, headers=headers).status_code == 200
        path = "/v1/requests/of-key-one/explain"
        assert client.get(path).status_code == 401
        assert client.get(path, headers=bearer("key-two")).status_code == 404
        assert client.get(path, headers=bearer("key-one")).status_code == 200
        told = client.get("/v1/requests/of-key-two/explain", headers=bearer("operator")).json()
        assert told["prompt"]["shared_with"] is None, "the other key's equal prompt is not told of"


def test_the_trace_needs_an_operator_s_key_where_there_are_keys(operate):
    with operate(KEYS) as operation, httpx.Client(base_url=operation.url) as client:
        assert client.get("/v1/server/trace").status_code == 401
        refused = client.get("/v1/server/trace", headers=bearer("key-one"))
        assert refused.status_code == 403
        assert "server.operator_keys" in refused.json()["error"]["message"]
        assert client.get("/v1/server/trace", headers=bearer("operator")).status_code == 200
    with operate({"server": {"api_keys": ["key"]}}) as operation:
        assert httpx.get(operation.url + "/v1/server/trace", headers=bearer("key")).status_code == 403


def test_an_operator_s_key_alone_closes_the_server(operate):
    with operate({"server": {"operator_keys": ["operator"]}}) as operation:
        assert httpx.get(operation.url + "/v1/models").status_code == 401
        assert httpx.get(operation.url + "/v1/models", headers=bearer("operator")).status_code == 200
        shown = httpx.get(operation.url + "/v1/server/effective-config", headers=bearer("operator"))
        assert shown.json()["server.operator_keys"]["value"] == "1 (hidden)"
        assert "operator" not in shown.json()["server.operator_keys"]["value"]


def test_the_trace_is_a_file_with_the_requests_of_the_time(operate):
    with operate() as operation, httpx.Client(base_url=operation.url) as client:
        client.post("/v1/completions", json=COMPLETION, headers={"X-Request-Id": "seen"})
        response = client.get("/v1/server/trace")
        assert response.status_code == 200
        assert "peregrine-trace.json" in response.headers["content-disposition"]
        names = {event["name"] for event in response.json()["traceEvents"]}
        assert {"ready", "cmpl-seen"} <= names
        assert client.get("/v1/server/trace", params={"steps": 1}).status_code == 200
        for wrong in (0, -1, 10_001, "many"):
            assert client.get("/v1/server/trace", params={"steps": wrong}).status_code == 400
