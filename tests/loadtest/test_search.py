"""The search for the highest rate within limits: on made-up servers, and as a command against a scripted one."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest

from loadtest.cli import main
from loadtest.client.outcome import Answer, Failure
from loadtest.compare.search import Bounds, Hopelessness, RateSearch, judge
from loadtest.report.session import Probe, Search, load
from loadtest.report.slo import ServiceLevel
from loadtest.report.statistics import summarize
from tests.support.scripted_server import Reply, ScriptedServer, whole_answer


class MadeUpServer:
    """Good up to a capacity, which each run sees with some noise."""

    def __init__(self, capacity: float, *, noise: float = 0.0, seed: int = 0) -> None:
        self.capacity, self.noise, self.random = capacity, noise, random.Random(seed)

    async def run(self, rate: float, number: int) -> Probe:
        is_good = rate <= self.capacity * (1 + self.random.uniform(-self.noise, self.noise))
        return Probe(rate, is_good, "" if is_good else "it was slow", False, {"ttft": rate}, 20, 0)


async def search(server: MadeUpServer, **bounds: float) -> Search:
    return await RateSearch(server.run, Bounds(**bounds)).search({"ttft": 1.0})


@pytest.mark.parametrize("capacity", [0.06, 0.3, 1.0, 3.7, 16.0, 250.0])
async def test_the_highest_rate_is_found_to_its_precision_in_few_runs(capacity: float) -> None:
    found = await search(MadeUpServer(capacity), lowest=0.05, precision=0.05)
    assert capacity / 1.05 <= found.best <= capacity
    assert len(found.probes) <= 20
    assert [probe.rate for probe in found.probes[-2:]] == [found.best] * 2  # the confirmations
    assert all(probe.is_good for probe in found.probes[-2:])
    assert found.stopped_by.endswith("it was slow")


@pytest.mark.parametrize("seed", range(30))
async def test_noise_near_the_border_makes_the_rate_lower_and_never_one_that_fails(seed: int) -> None:
    found = await search(MadeUpServer(4.0, noise=0.15, seed=seed), precision=0.05, max_runs=60)
    assert 4.0 * 0.7 < found.best <= 4.0 * 1.15
    assert sum(probe.rate == found.best for probe in found.probes) == 3
    assert all(probe.is_good for probe in found.probes if probe.rate == found.best)


async def test_a_server_that_keeps_no_limit_at_all_ends_the_search() -> None:
    found = await search(MadeUpServer(0.0), lowest=0.1)
    assert found.best is None
    assert [probe.rate for probe in found.probes] == [1.0, 0.5, 0.25, 0.125, 0.1]
    assert found.stopped_by == "even 0.1 requests/s are too many"


async def test_a_server_that_is_never_too_slow_is_confirmed_at_the_highest_rate_that_was_asked_for() -> None:
    found = await search(MadeUpServer(1e9), highest=6.0)
    assert [probe.rate for probe in found.probes] == [1.0, 2.0, 4.0, 6.0, 6.0, 6.0]
    assert (found.best, found.stopped_by) == (6.0, "higher ones were not asked for")


async def test_runs_and_seconds_are_limits_of_a_search() -> None:
    found = await search(MadeUpServer(1e9), max_runs=3)
    assert (found.best, len(found.probes)) == (None, 3)
    assert "3 runs" in found.stopped_by
    seconds = iter(range(0, 1000, 10))
    timed = RateSearch(MadeUpServer(1e9).run, Bounds(max_seconds=35), clock=lambda: next(seconds))
    found = await timed.search({"ttft": 1.0})
    assert found.best is None
    assert len(found.probes) == 3
    assert all(slower.rate < faster.rate for slower, faster in pairwise(found.probes))


async def test_a_rate_is_not_confirmed_by_runs_that_there_was_no_room_for() -> None:
    """Its fourth run would have been the second confirmation."""
    found = await search(MadeUpServer(1e9), highest=2.0, max_runs=3)
    assert found.best is None


@pytest.mark.parametrize(
    "bounds",
    [{"start": 0.0}, {"start": 9.0, "highest": 8.0}, {"start": 0.001}, {"precision": 0.0}, {"highest": float("inf")}],
)
def test_bounds_that_do_not_fit_together_are_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must lie from|precision"):
        Bounds(**bounds)


def answer(first: float, *gaps: float) -> Answer:
    end = first + sum(gaps)
    return Answer(0.0, 0.0, first, end, end, gaps, 5, 0, 1 + len(gaps), 1 + len(gaps), False)


def test_a_run_is_judged_by_the_99th_percentiles_of_its_limits_and_by_failures() -> None:
    level = ServiceLevel(ttft=1.0, itl=0.1)
    good = [answer(0.5, 0.05, 0.05) for _ in range(200)]

    def judged(outcomes: list) -> Probe:
        return judge(2.0, summarize(outcomes, level), level, num_planned=len(outcomes), is_cut=False)

    assert judged(good).is_good
    assert judged([*good, answer(9.0, 0.05, 0.05)]).is_good  # one of 200
    slow = judged([*good, *[answer(9.0, 0.05, 0.05)] * 4])
    assert (slow.is_good, slow.reason) == (False, "ttft p99 is 9000 ms")
    stuttering = judged([*good, *[answer(0.5, 0.05, 0.4)] * 9])
    assert "itl p99 is 400 ms" in stuttering.reason
    failure = Failure("http_429", "full", 0.0, 0.1)
    assert judged([*good, failure]).is_good
    assert "4 of 204 requests failed (http_429)" in judged([*good, *[failure] * 4]).reason
    assert not judged([failure] * 3).is_good


def test_a_client_that_is_too_slow_to_send_is_no_verdict_of_the_server_s() -> None:
    late = Answer(0.0, 0.2, 0.5, 0.6, 0.6, (0.1,), 5, 0, 2, 2, False)
    level = ServiceLevel(ttft=1.0)
    probe = judge(2.0, summarize([late] * 30, level), level, num_planned=30, is_cut=False)
    assert "this client sent up to 200 ms late" in probe.reason


@pytest.mark.parametrize("num_planned", [20, 101, 1000])
def test_a_run_is_given_up_only_where_no_further_answer_could_save_it(num_planned: int) -> None:
    level = ServiceLevel(ttft=1.0)
    hopeless = Hopelessness(level, num_planned)
    num_bad = next(n for n in range(1, num_planned) if hopeless(answer(2.0)))
    others = [answer(0.1)] * (num_planned - num_bad)
    whole = judge(1.0, summarize([answer(2.0)] * num_bad + others), level, num_planned=num_planned, is_cut=False)
    assert not whole.is_good
    failing = Hopelessness(level, num_planned)
    assert not failing(answer(0.1))
    assert sum(not failing(Failure("timeout", "", 0.0, 1.0)) for _ in range(50)) == num_planned // 100


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine's client may send late: no test depends on it."""
    monkeypatch.setattr("loadtest.compare.search.MAX_LATENESS", 1000.0)


@pytest.fixture
def crowded() -> Iterator[ScriptedServer]:
    """Refuses what is beyond the 60th request of a run, however fast they come. A run begins with GET /metrics."""
    num_requests = 0

    def metrics() -> str:
        nonlocal num_requests
        num_requests = 0
        return ""

    def script(_: int, served) -> Reply:
        nonlocal num_requests
        num_requests += 1
        return whole_answer(served) if num_requests <= 60 else Reply(((0.0, b"full"),), status=429)

    server = ScriptedServer(script, metrics=metrics)
    yield server
    server.stop()


LOAD = ["--prompt", "8", "--output", "3", "--seed", "3", "--warmup", "1"]


@pytest.mark.usefixtures("unhurried")
def test_search_finds_a_rate_and_reports_it_with_every_run(crowded, tmp_path, capsys) -> None:
    """A run of half a second has more than 60 requests from 120 per second on."""
    server = crowded
    command = ["search", "--url", server.url, *LOAD, "--slo", "ttft=60s", "--start", "20", "--highest", "400"]
    rates = ["--seconds", "0.5", "--precision", "0.25", "--confirmations", "1"]
    assert main([*command, *rates, "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "requests/s is the highest rate" in printed.out
    (file,) = tmp_path.glob("*-search.json")
    session = load(file)
    search = session.search
    assert 120 / 1.25 <= search.best <= 120
    assert len(session.measurements) == len(search.probes)
    assert not all(probe.is_good for probe in search.probes)
    assert printed.err.count("requests/s: ") == len(search.probes)  # a line for each run
    prompts = [tuple(request.body["prompt"]) for request in server.served]
    assert len(set(prompts)) == len(prompts)  # no run finds another's prompts in a cache
    page = file.with_suffix(".html").read_text()
    assert "The highest rate within the limits" in page
    assert "ttft, p99" in page
    assert not re.search(r"<(script|link|img|image)|src=|href=\"[^#]", page)


@pytest.mark.usefixtures("unhurried")
def test_a_run_that_cannot_become_good_is_ended_at_once(serve, tmp_path, capsys) -> None:
    """All its requests would take 50 s to send."""
    server = serve(lambda _, served: Reply(((0.0, b"busy"),), status=503))
    command = ["search", "--url", server.url, *LOAD, "--warmup", "0", "--slo", "ttft=1s", "--seconds", "1"]
    rates = ["--start", "40", "--lowest", "40", "--min-requests", "2000"]
    assert main([*command, *rates, "--results", str(tmp_path)]) == 1
    assert len(server.served) < 100
    assert "even 40 requests/s are too many" in capsys.readouterr().out
    (file,) = tmp_path.glob("*-search.json")
    assert load(file).search.probes[0].is_cut


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "needs limits"),
        (["--slo", "ttft=1s", "--start", "9", "--highest", "3"], "must lie from"),
        (["--slo", "ttft=1s", "--scenario", "nowhere"], "no scenario"),
    ],
)
def test_a_search_that_cannot_be_meant_is_refused(options: list[str], said: str, capsys) -> None:
    assert main(["search", "--url", "http://127.0.0.1:1", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("unhurried")
def test_a_search_takes_the_traffic_and_the_limits_of_a_scenario(serve, tmp_path) -> None:
    server = serve(lambda _, served: whole_answer(served))
    own = tmp_path / "own.yaml"
    traffic = "traffic: [{name: a, prompt: 6, output: 2}, {name: b, prompt: 9, output: 2}]"
    own.write_text(f"arrivals: [{{rate: 1, seconds: 1}}]\n{traffic}\nslo: {{ttft: 99s}}\napi: completions")
    command = ["search", "--url", server.url, "--scenario", str(own), "--results", str(tmp_path), "--seed", "1"]
    assert main([*command, "--start", "50", "--highest", "50", "--seconds", "0.3", "--confirmations", "0"]) == 0
    assert {len(request.body["prompt"]) for request in server.served} == {6, 9}
    (file,) = tmp_path.glob("*-search.json")
    session = load(file)
    assert session.search.limits == {"ttft": 99.0}
    assert set(session.measurements[0].kinds) == {"a", "b"}
