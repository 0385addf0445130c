"""Health tells the truth at every moment."""

import time

import httpx
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from engine.types import StepStats
from tests.support.server_world import wait_until

PROBES = ("/livez", "/readyz", "/startupz", "/health")


def answers(url: str) -> dict[str, int]:
    return {path: httpx.get(url + path).status_code for path in PROBES}


def test_a_starting_server_is_alive_and_nothing_else(operate):
    with operate(ready=False) as operation:
        assert answers(operation.url) == {"/livez": 200, "/readyz": 503, "/startupz": 503, "/health": 503}
        operation.call(operation.engine.enter, "weights", "98 MB as float32")
        response = httpx.get(operation.url + "/readyz")
        body = response.json()
        assert (body["status"], body["state"]) == ("unavailable", "starting")
        assert (body["phase"], body["phase_detail"]) == ("weights", "98 MB as float32")
        assert 0 <= body["seconds"] <= body["uptime_seconds"]
        assert "weights 98 MB as float32" in body["error"]["message"]
        assert int(response.headers["retry-after"]) >= 1


def test_a_ready_server_is_all_of_it(operate):
    with operate() as operation:
        assert answers(operation.url) == dict.fromkeys(PROBES, 200)
        body = httpx.get(operation.url + "/readyz").json()
        assert (body["status"], body["state"], body["num_restarts"]) == ("ok", "ready", 0)
        assert "error" not in body


def test_the_server_is_not_ready_before_its_tokenizer_is(operate):
    with operate(ready=False) as operation:
        operation.engine.state = "ready"  # the engine has its model; the text side has not
        assert answers(operation.url) == {"/livez": 200, "/readyz": 503, "/startupz": 503, "/health": 503}
        assert httpx.get(operation.url + "/readyz").json()["state"] == "starting"


def test_a_restart_of_the_engine_turns_readiness_off_and_on_again(operate):
    with operate() as operation:
        for restart in (1, 2):
            operation.call(operation.engine.die)
            assert answers(operation.url) == {"/livez": 200, "/readyz": 503, "/startupz": 200, "/health": 503}
            body = httpx.get(operation.url + "/readyz").json()
            assert (body["state"], body["num_restarts"]) == ("restarting", restart)
            operation.call(operation.engine.become_ready)
            assert answers(operation.url) == dict.fromkeys(PROBES, 200)


def test_the_seconds_are_those_of_the_state(operate):
    with operate() as operation:
        time.sleep(0.2)
        operation.call(operation.engine.die)
        body = httpx.get(operation.url + "/readyz").json()
        assert body["uptime_seconds"] - body["seconds"] >= 0.2


def test_a_draining_server_is_alive_and_serves_but_is_not_ready(operate):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
    with operate() as operation, httpx.Client(base_url=operation.url) as client:
        operation.engine.say("yes")
        assert "connection" not in client.post("/v1/completions", json=body).headers
        operation.call(operation.state.end_readiness)
        assert answers(operation.url) == {"/livez": 200, "/readyz": 503, "/startupz": 200, "/health": 503}
        assert httpx.get(operation.url + "/readyz").json()["state"] == "draining"
        served = client.post("/v1/completions", json=body)
        assert (served.status_code, served.headers["connection"]) == (200, "close"), "the next one goes elsewhere"
        operation.call(operation.state.refuse_requests)
        refused = client.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["x-should-retry"] == "true"
        assert answers(operation.url)["/livez"] == 200


def test_a_failed_engine_makes_the_process_worth_replacing(operate):
    with operate(ready=False) as operation:
        operation.call(operation.engine.fail, "memory", "the weights do not fit")
        wait_until(operation.state.failed.is_set)
        assert set(answers(operation.url).values()) == {503}
        body = httpx.get(operation.url + "/livez").json()
        assert (body["state"], body["error"]["code"]) == ("failed", "failed")
        assert operation.state.failure.kind == "memory"


def test_a_tokenizer_that_cannot_be_read_is_a_failure_of_the_model(operate):
    with operate(ready=False) as operation:
        assets = operation.engine._loaded.tokenizer
        broken = type(assets)(tokenizer_json="{}", chat_template=None, special_tokens={})
        info = operation.engine._loaded
        operation.engine._loaded = type(info)(**{**_fields(info), "tokenizer": broken})
        operation.call(operation.engine.become_ready)
        wait_until(operation.state.failed.is_set)
        assert operation.state.failure.kind == "model"
        assert "tokenizer" in operation.state.failure.message
        assert httpx.get(operation.url + "/readyz").status_code == 503


def test_probes_may_be_asked_with_head(operate):
    with operate() as operation:
        for path in PROBES:
            response = httpx.head(operation.url + path)
            assert (response.status_code, response.content) == (200, b"")


def test_models_show_their_context_once_they_are_loaded(operate):
    with operate(ready=False) as operation:
        card = httpx.get(operation.url + "/v1/models").json()["data"][0]
        assert card["context"] == {"trained": None, "served": None, "max_request_now": None}
        operation.call(operation.engine.become_ready)
        listing = httpx.get(operation.url + "/v1/models").json()
        assert [card["id"] for card in listing["data"]] == ["tiny", "org/other-name"]
        assert listing["data"][0]["context"] == {"trained": 256, "served": 256, "max_request_now": 256}
        assert httpx.get(operation.url + "/v1/models/org/other-name").json()["root"] == "tiny"
        missing = httpx.get(operation.url + "/v1/models/gpt-4")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_the_effective_config_names_the_source_of_every_setting_and_hides_keys(operate):
    with operate({"server": {"api_keys": ["secret-1", "secret-2"]}}) as operation:
        headers = {"Authorization": "Bearer secret-2"}
        response = httpx.get(operation.url + "/v1/server/effective-config", headers=headers)
        settings = response.json()
        assert "secret" not in response.text
        assert settings["server.api_keys"]["value"] == "2 (hidden)"
        assert settings["limits.max_n"] == {"value": 128, "source": "default", "reason": "choices per prompt"}
        assert all(set(entry) == {"value", "source", "reason"} for entry in settings.values())


def test_the_effective_config_says_how_chats_are_taken_apart(operate):
    with operate() as operation:
        wait_until(lambda: operation.state.template_traits, 60)
        settings = httpx.get(operation.url + "/v1/server/effective-config").json()
        assert settings["chat.tool_calls"]["value"] == "tool_call tags, by the server's instructions"
        assert "knows no tools" in settings["chat.tool_calls"]["reason"]
        assert settings["chat.reasoning"]["value"] == "none"


def test_the_effective_config_says_what_each_matrix_is_kept_as(operate):
    with operate() as operation:
        settings = httpx.get(operation.url + "/v1/server/effective-config").json()
        assert settings["weights.layers.mlp.down_proj"]["value"] == "int4 (29), float16 (1)"
        assert "in 30 layers" in settings["weights.layers.mlp.down_proj"]["reason"]
        assert settings["weights.lm_head"]["value"] == "int8"


def test_metrics_come_in_the_format_and_the_coding_that_a_scraper_accepts(operate):
    with operate({"metrics": {"vllm_names": True}}) as operation, httpx.Client(base_url=operation.url) as client:
        plain = client.get("/metrics", headers={"Accept-Encoding": "identity"})
        assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "content-encoding" not in plain.headers
        assert "# EOF" not in plain.text
        accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
        opened = client.get("/metrics", headers={"Accept": accept, "Accept-Encoding": "gzip"})
        assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert opened.headers["content-encoding"] == "gzip"
        assert "Accept-Encoding" in opened.headers["vary"]
        assert opened.text.endswith("# EOF\n")
        names = {family.name for family in text_string_to_metric_families(plain.text)}
        again = {family.name for family in openmetrics_families(opened.text)}
        assert {"peregrine_requests_running", "vllm:num_requests_running"} <= names & again


def test_the_version_is_told(operate):
    with operate() as operation:
        body = httpx.get(operation.url + "/version").json()
        assert body["version"]
        assert body["system_fingerprint"] == "fp_test"


def _fields(struct: object) -> dict[str, object]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_the_longest_request_that_would_run_now_follows_the_free_memory(operate):
    numbers = dict.fromkeys(StepStats.__struct_fields__, 0) | {"accepted_by_position": []}
    with operate() as operation:  # 2560 tokens of KV cache, requests of up to 256
        for num_owned, expected in ((0, 256), (90, 256), (95, 128), (100, 0)):
            stats = StepStats(**{**numbers, "num_blocks": 100, "num_owned_blocks": num_owned})
            operation.call(operation.engine.observer.on_step, stats)
            context = httpx.get(operation.url + "/v1/models/tiny").json()["context"]
            assert context["max_request_now"] == expected
