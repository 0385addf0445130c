"""The dashboard and the rules against a real Prometheus that scrapes two real replicas under mixed traffic.

Every expression of every panel and rule must give numbers that can be: none empty, none that is not a number, no share
above one.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from server.monitoring.dashboard import DEATHS
from server.monitoring.dashboard_rows import ROWS
from server.monitoring.rules import ALERTS, RECORDINGS
from tests import ROOT
from tests.support.server_process import Server, free_port, run_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed; make monitoring-test"),
]
OPTIONS = (
    "--max-num-seqs", "2", "--set", "limits.max_queued_requests=4", "--set", "speculation.method=ngram",
    "--set", "speculation.depth=3", "--set", "speculation.num_drafts=3", "--set", "scheduler.target_itl_ms=50",
)  # fmt: skip
TRAFFIC_SECONDS = 20


class Prometheus:
    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def query(self, expression: str) -> list[float]:
        """The values of an instant query. Raises where the expression is not valid."""
        answer = self._client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        return [float(series["value"][1]) for series in answer["data"]["result"]]

    def rules(self) -> list[dict]:
        groups = self._client.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def replicas(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    folder = tmp_path_factory.mktemp("replicas")
    with run_server(tiny_model, folder, *OPTIONS) as one, run_server(tiny_model, folder, *OPTIONS) as two:
        one.wait_until_ready()
        two.wait_until_ready()
        yield [one, two]


@pytest.fixture(scope="module")
def prometheus(replicas: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scrapes both every second, with the project's rules, while both are busy."""
    folder = tmp_path_factory.mktemp("prometheus")
    targets = [server.url.removeprefix("http://") for server in replicas]
    config = yaml.safe_load((ROOT / "configs" / "monitoring" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ROOT / "configs" / "monitoring" / "rules.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    stop = threading.Event()
    busy = [
        threading.Thread(target=keep_busy, args=(server, number, stop)) for server in replicas for number in range(8)
    ]
    for thread in busy:
        thread.start()
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, targets)
        time.sleep(TRAFFIC_SECONDS)
        with httpx.Client(base_url=url, timeout=30) as client:
            yield Prometheus(client)
    finally:
        stop.set()
        for thread in busy:
            thread.join(60)
        process.terminate()
        process.wait(30)


def keep_busy(server: Server, number: int, stop: threading.Event) -> None:
    """One client: long and short answers, shared prefixes, streams, mistakes, and a place in the queue too few."""
    shared = "hello world of tokens and blocks " * 3
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for turn in range(100_000):
            if stop.is_set():
                return
            body = {
                "model": "tiny",
                "prompt": f"{shared}{number} {turn}",
                "max_tokens": 8 + 8 * (turn % 4),
                "seed": turn,
            }
            if turn % 7 == 3:
                body["model"] = "unknown"
            if turn % 11 == 5:
                body["max_tokens"] = -1
            if turn % 5 == 1:
                leave_early(client, body | {"stream": True, "max_tokens": 200})
            else:
                client.post("/v1/completions", json=body | {"temperature": 0, "n": 1 + turn % 2})


def leave_early(client: httpx.Client, body: dict) -> None:
    with contextlib.suppress(httpx.HTTPError), client.stream("POST", "/v1/completions", json=body) as response:
        for _ in zip(response.iter_lines(), range(20), strict=False):
            pass


def wait_for(url: str, targets: list[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, KeyError):
            answer = httpx.get(f"{url}/api/v1/query", params={"query": "up == 1"}).json()
            if len(answer["data"]["result"]) == len(targets):
                return
        time.sleep(0.2)
    raise AssertionError("Prometheus does not scrape")


def filled_in(expression: str) -> str:
    """As Grafana would ask, of all models and replicas."""
    return expression.replace("$__rate_interval", "10s").replace("$model", ".*").replace("$instance", ".*")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_every_panel_shows_numbers_that_can_be(prometheus: Prometheus, row) -> None:
    problems = []
    for panel in row.panels:
        for query in panel.queries:
            values = prometheus.query(filled_in(query.expression))
            what = f"{panel.title}: {query.expression}"
            if not values:
                problems.append(f"empty: {what}")
            if not all(map(math.isfinite, values)):
                problems.append(f"not a number: {what} {values}")
            highest = math.inf if panel.maximum is None else panel.maximum
            if not all(0 <= value <= highest for value in values):
                problems.append(f"cannot be: {what} {values}")
    assert not problems, "\n".join(problems)


def test_the_traffic_was_of_every_kind(prometheus: Prometheus) -> None:
    """Else the numbers above would show little."""
    for status in ("200", "400", "404", "429", "499"):
        [count] = prometheus.query(f'sum(peregrine_requests_total{{status="{status}"}})')
        assert count > 0, status
    for family in ("prefix_cache_hits_total", "accepted_draft_tokens_total", "step_tokens_count"):
        assert all(value > 0 for value in prometheus.query(f"sum by (instance) (peregrine_{family})"))
    assert prometheus.query("max(max_over_time(peregrine_requests_waiting[1m]))")[0] > 0


def test_every_rule_is_evaluated_and_gives_numbers_that_can_be(prometheus: Prometheus) -> None:
    rules = prometheus.rules()
    assert {rule["name"] for rule in rules} == {rule.name for rule in (*RECORDINGS, *ALERTS)}
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    for rule in RECORDINGS:
        values = prometheus.query(rule.name)
        assert values, rule.name
        assert all(map(math.isfinite, values)), rule.name
        assert all(value >= 0 for value in values)
        assert "_ratio:" not in rule.name or max(values) <= 1, f"{rule.name}: {values}"
    for alert in ALERTS:
        values = prometheus.query(alert.expression)
        assert all(map(math.isfinite, values))
        assert values or not alert.condition, f"{alert.name} watches nothing: {alert.expression}"
    prometheus.query(filled_in(DEATHS))


def test_healthy_replicas_fire_nothing_but_what_the_traffic_asked_for(prometheus: Prometheus) -> None:
    firing = {rule["name"] for rule in prometheus.rules() if rule.get("state") == "firing"}
    assert firing == set()


def test_a_dead_engine_is_seen(prometheus: Prometheus, replicas: list[Server]) -> None:
    replicas[0].engine_process.kill()
    replicas[0].wait_for(lambda: replicas[0].metric("peregrine_engine_restarts_total") == 1, 60)
    deadline = time.monotonic() + 30
    while not prometheus.query('ALERTS{alertname="PeregrineEngineDied", alertstate="firing"}'):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert prometheus.query(filled_in(DEATHS)), "the dashboard's annotation"
