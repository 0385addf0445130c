"""What a load balancer in front changes: whose address is logged, and under which paths the server is found."""

import logging

import httpx
import pytest

from server.settings import ConfigError, Layer, load_config
from tests.support.server_world import wait_until


def addresses(operation, caplog, *forwarded: str) -> list[str]:
    """The clients in the lines of requests with these X-Forwarded-For headers."""
    caplog.set_level(logging.INFO, logger="peregrine.access")
    for value in forwarded:
        httpx.get(operation.url + "/v1/models", headers={"X-Forwarded-For": value})

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "peregrine.access"]

    wait_until(lambda: len(lines()) == len(forwarded))
    return [dict(part.split("=", 1) for part in line.split())["client"] for line in lines()]


def test_the_client_of_a_trusted_balancer_is_the_one_that_it_names(operate, caplog) -> None:
    with operate({"access": {"trusted_proxies": ["127.0.0.0/8", "10.0.0.1"]}}) as operation:
        seen = addresses(operation, caplog, "203.0.113.7", "1.1.1.1, 203.0.113.8, 10.0.0.1", "2001:db8::1")
    assert seen == ["203.0.113.7", "203.0.113.8", "2001:db8::1"], "the last one that is no balancer of ours"


def test_nobody_else_may_name_a_client(operate, caplog) -> None:
    with operate({"access": {"trusted_proxies": ["10.0.0.0/8"]}}) as operation:
        assert addresses(operation, caplog, "203.0.113.7") == ["127.0.0.1"]


def test_what_is_no_address_forges_no_field(operate, caplog) -> None:
    with operate({"access": {"trusted_proxies": "*"}}) as operation:
        assert addresses(operation, caplog, "a id=forged", "nobody") == ["-", "-"]


@pytest.mark.parametrize("network", ["10.0.0.0/33", "balancer", "10.0.0.1/8", ""])
def test_networks_are_checked_at_the_start(network: str) -> None:
    with pytest.raises(ConfigError, match="trusted_proxies"):
        load_config([Layer("a", {"access.trusted_proxies": [network]})])


def test_a_server_below_a_path_is_found_with_it_and_without(operate, caplog) -> None:
    caplog.set_level(logging.INFO, logger="peregrine.access")
    keys = {"server": {"api_keys": ["key"]}, "access": {"root_path": "/llm"}}
    good = {"Authorization": "Bearer key"}
    with operate(keys) as operation, httpx.Client(base_url=operation.url) as client:
        for path in ("/llm/v1/models", "/v1/models", "/llm//v1/models/", "/llm/v1/models/tiny"):
            assert client.get(path, headers=good).status_code == 200, path
            assert client.get(path).status_code == 401, path
        assert client.get("/llm/readyz").status_code == 200
        assert client.get("/llmv1/models", headers=good).status_code == 404
        assert client.get("/llm/llm/v1/models").status_code == 401
        document = client.get("/llm/openapi.json", headers=good).json()
        assert document["servers"] == [{"url": "/llm"}]
    assert not any("readyz" in record.getMessage() for record in caplog.records), "probes are quiet below it too"


@pytest.mark.parametrize("path", ["llm", "/llm/", "/a//b", "/a?b", "/"])
def test_a_root_path_is_checked_at_the_start(path: str) -> None:
    with pytest.raises(ConfigError, match="root_path"):
        load_config([Layer("a", {"access.root_path": path})])
