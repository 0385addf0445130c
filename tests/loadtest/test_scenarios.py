"""Scenarios: their files, what requests they make, and the command, against scripted servers."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from loadtest.cli import main
from loadtest.report.session import Session, load
from loadtest.scenarios.scenario_file import FOLDER, find_scenario, load_scenario
from loadtest.scenarios.traffic import TrafficWorkload
from loadtest.workload.arrivals import Phase, PhasedArrivals
from loadtest.workload.prompts import Message, PromptText
from tests.support.scripted_server import Reply, event, whole_answer

WORDS = PromptText(tokens_of_template=4.0, tokens_per_word=1.0)
SMALL = """
arrivals: [{rate: 200, seconds: 0.1}]
traffic:
  - {name: a, prompt: 5, output: 2}
"""


def scenario_file(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(text)
    return path


def workload_of(folder: Path, text: str, **options) -> TrafficWorkload:
    return TrafficWorkload(load_scenario(scenario_file(folder, text)), "own", seed=3, text=WORDS, **options)


def complaints(folder: Path, text: str) -> str:
    with pytest.raises(ValueError, match=r"own\.yaml") as refusal:
        load_scenario(scenario_file(folder, text))
    return str(refusal.value)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_scenario_that_comes_with_the_load_generator_can_be_read_and_makes_requests(path: Path) -> None:
    scenario = load_scenario(find_scenario(path.stem))
    assert scenario.description
    assert scenario.service_level is not None
    workload = TrafficWorkload(scenario, path.stem, 1, dict.fromkeys(scenario.tenants, "key"), text=WORDS)
    assert {workload.kind_of(index) or scenario.traffic[0].name for index in range(200)} == {
        traffic.name for traffic in scenario.traffic
    }
    times = list(scenario.times().times(1))
    assert times == sorted(times)
    assert 5 < len(times) < 200


def test_all_that_is_wrong_with_a_file_is_said_with_its_place_and_nothing_of_pydantic_s(tmp_path) -> None:
    text = """
arrivals:
  - {rate: [1, x], seconds: 3}
  - {rate: -1, seconds: 0}
  - {every: 3, seconds: 3, rat: 4}
traffic:
  - {name: a, prompt: many, output: 0}
  - {name: b, prompt: true, output: 3, weight: 0}
colour: blue
"""
    lines = complaints(tmp_path, text).split("\n")
    places = [line.split(": ")[1] for line in lines]
    assert places == [
        "arrivals.0.rate.1", "arrivals.1.seconds", "arrivals.1.rate", "arrivals.2.rat", "traffic.0.prompt",
        "traffic.0.output", "traffic.1.weight", "traffic.1.prompt", "colour",
    ]  # fmt: skip
    assert "'x'" in lines[0]
    assert "uniform:64:256" in lines[4]
    assert "no such key" in lines[-1]
    assert not re.search(r"pydantic|function-|Value error", "\n".join(lines))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping"),
        ("[", "line 1"),
        ("[" * 5000, "nested too deeply"),
        ("a: 1\na: 2", "line 2: a stands there twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("? [1]\n: 2", "a key must be a word"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("arrivals: [{rate: 1, seconds: 9}]\ntraffic: []", "at least 1 item"),
        ("arrivals: [{seconds: 9}]\ntraffic: [{name: a, prompt: 5, output: 2}]", "nothing would ever come"),
        ("arrivals: [{rate: 9999, seconds: 9999}]\ntraffic: [{name: a, prompt: 5, output: 2}]", "99,980,001 requests"),
        ("arrivals: {concurrency: 3}\ntraffic: [{name: a, prompt: 5, output: 2}]", "would never end"),
        ("arrivals: [{rate: .nan, seconds: 9}]\ntraffic: [{name: a, prompt: 5, output: 2}]", "finite"),
        (SMALL.replace("output: 2", "output: 2, tenant: x"), "tenants lacks"),
        (SMALL + "slo: {ttft: soon}", "no time"),
        (SMALL + "slo: {ttft: -1}", "above 0"),
        (SMALL + "api: words", "api"),
        (SMALL.replace("output: 2", "output: 2, turns: 3") + "api: completions", "set api to chat"),
        (SMALL.replace("prompt: 5", "prompt: 99999999999"), "the most"),
    ],
)
def test_what_no_scenario_can_be_is_refused_with_the_reason(text: str, said: str, tmp_path) -> None:
    assert said in complaints(tmp_path, text)


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"UTF-8|special characters"):
        load_scenario(path)
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(ValueError, match=r"2,097,152 bytes"):
        load_scenario(path)


def test_kinds_come_by_their_weights_and_the_same_ones_in_every_round(tmp_path) -> None:
    text = "arrivals: [{rate: 1, seconds: 1}]\ntraffic:\n"
    text += "".join(f"  - {{name: {name}, weight: {w}, prompt: 5, output: 2}}\n" for name, w in (("a", 1), ("b", 3)))
    workload = workload_of(tmp_path, text)
    kinds = [workload.kind_of(index) for index in range(2000)]
    assert 0.70 < Counter(kinds)["b"] / 2000 < 0.80
    assert [workload.of_stream(7, WORDS).kind_of(index) for index in range(50)] == kinds[:50]


def test_prompts_of_a_group_begin_alike_and_no_two_are_the_same(tmp_path) -> None:
    text = SMALL.replace("prompt: 5", "shared_prefix: {tokens: 30, groups: 3}, prompt: uniform:5:20")
    workload = workload_of(tmp_path, text)
    prompts = [workload.exchange(index).prompt for index in range(60)]
    assert {[message.role for message in prompt] == ["system", "user"] for prompt in prompts} == {True}
    openings = Counter(prompt[0].content for prompt in prompts)
    assert len(openings) == 3
    assert {len(opening.split()) for opening in openings} == {30}
    assert len(set(prompts)) == 60
    again = workload.of_stream(1, WORDS).exchange(0).prompt
    assert again[0] in {prompt[0] for prompt in prompts}
    assert again not in prompts


def test_token_ids_are_sent_where_a_scenario_speaks_completions(tmp_path) -> None:
    text = SMALL.replace("prompt: 5", "shared_prefix: {tokens: 30}, prompt: 7") + "api: completions"
    workload = TrafficWorkload(load_scenario(scenario_file(tmp_path, text)), "own", seed=3)
    first, second = (workload.exchange(index).prompt for index in range(2))
    assert len(first) == len(second) == 37
    assert first[:30] == second[:30]
    assert first[30:] != second[30:]


def test_a_conversation_says_again_what_was_said_with_the_answers_that_came(tmp_path) -> None:
    workload = workload_of(tmp_path, SMALL.replace("prompt: 5", "turns: 3, think_seconds: 2, prompt: 5"))
    exchange, waits = workload.exchange(0), []
    for turn in range(2):
        following = workload.follow_up(0, turn, exchange, f"answer {turn}")
        assert following.exchange.prompt[: len(exchange.prompt)] == exchange.prompt
        assert following.exchange.prompt[-2] == Message("assistant", f"answer {turn}")
        assert following.exchange.prompt[-1].role == "user"
        waits.append(following.think_seconds)
        exchange = following.exchange
    assert workload.follow_up(0, 2, exchange, "the last one") is None
    thinking = [workload.follow_up(index, 0, workload.exchange(index), "").think_seconds for index in range(400)]
    assert np.mean(thinking) == pytest.approx(2, rel=0.2)
    assert waits == [workload.follow_up(0, turn, workload.exchange(0), "x").think_seconds for turn in range(2)]


def test_a_changing_rate_brings_as_many_as_its_mean_and_more_where_it_is_higher() -> None:
    ramp = PhasedArrivals([Phase(100, 0.0, 20.0), Phase(50), Phase(100, 20.0, 0.0)])
    times = np.array(list(ramp.times(5)))
    assert len(times) == pytest.approx(2000, rel=0.1)
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < 250)).all()
    assert not ((times > 100) & (times < 150)).any()
    by_quarter = np.histogram(times, [0, 25, 50, 75, 100])[0]
    assert by_quarter == pytest.approx([62, 188, 312, 438], rel=0.3)
    assert list(ramp.times(5)) == list(times)
    assert list(ramp.scaled(2.0).times(6)) != list(times)


def test_bursts_come_at_one_moment_beside_the_others() -> None:
    arrivals = PhasedArrivals([Phase(10, 1.0, 1.0, burst=5, burst_every=4), Phase(10, burst=3)])
    times = list(arrivals.times(1))
    assert times == sorted(times)
    counts = Counter(times)
    assert {at: n for at, n in counts.items() if n > 1} == {0.0: 5, 4.0: 5, 8.0: 5, 10.0: 3}
    assert str(arrivals) == "1/s and 5 at once every 4 s for 10 s, 3 at once for 10 s"


def run_scenario(folder: Path, server, text: str, *options: str) -> int:
    command = ["scenario", str(scenario_file(folder, text)), "--url", server.url, "--warmup", "0", "--seed", "1"]
    return main([*command, "--results", str(folder), *options])


def result_of(folder: Path) -> Session:
    (file,) = folder.glob("*.json")
    return load(file)


def chatty(_: int, served) -> Reply:
    """Answers a chat, one word a token; the usage counts the prompt's words."""
    count = served.body["max_tokens"]
    num_words = sum(len(message["content"].split()) for message in served.body["messages"])
    pieces = [(0.0, event(f" t{i}", chat=True)) for i in range(count)]
    usage = event(finish_reason="length", usage=(num_words, count), chat=True)
    return Reply((*pieces, (0.0, usage), (0.0, b"data: [DONE]\n\n")))


TWO_KINDS = """
arrivals: [{rate: 100, burst: 2, seconds: 0.3}]
tenants: {small: {key_env: SMALL_TEST_KEY}}
traffic:
  - {name: short, prompt: 5, output: 2, tenant: small, weight: 2}
  - {name: talk, prompt: 6, output: 3, turns: 2, shared_prefix: {tokens: 9}}
slo: {ttft: 99s, itl: 99s}
"""


def test_a_scenario_is_run_and_reported_by_kind_and_over_time(serve, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("SMALL_TEST_KEY", "secret-of-small")
    server = serve(chatty)
    assert run_scenario(tmp_path, server, TWO_KINDS, "--api-key", "everybody-s") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^short .*\n", printed, re.MULTILINE)
    assert re.search(r"^talk ", printed, re.MULTILINE)
    assert "goodput" in printed

    session = result_of(tmp_path)
    (run,) = session.measurements
    calibration, sent = server.served[:2], server.served[2:]
    assert all(len(request.body["messages"]) == 1 for request in calibration)
    keys = Counter(request.headers["authorization"] for request in sent)
    assert keys["Bearer secret-of-small"] == run.kinds["short"].num_answers > 0
    assert keys["Bearer everybody-s"] == run.kinds["talk"].num_answers > 0
    second_turns = [request for request in sent if len(request.body["messages"]) == 4]
    assert len(second_turns) == run.kinds["talk"].num_answers / 2
    assert {request.body["messages"][2]["content"] for request in second_turns} == {" t0 t1 t2"}
    assert session.scenarios[0].load.startswith("100/s and 2 at once")
    assert session.service_level == {"ttft": 99.0, "itl": 99.0}
    assert run.figures.goodput == pytest.approx(run.figures.requests_per_second)
    assert len(run.samples) == len(sent)
    assert Counter(sample.turn for sample in run.samples) == {0: len(sent) - len(second_turns), 1: len(second_turns)}

    (file,) = tmp_path.glob("*.json")
    page = file.with_suffix(".html").read_text()
    assert "secret" not in page + file.read_text()
    assert not re.search(r"<(script|link|img|image)|src=|href=\"[^#]", page)
    picture = page[page.index("<svg") : page.index("</svg>") + 6]
    text = " ".join(node.text or "" for node in ElementTree.fromstring(picture).iter())
    for title in ("Time to first token, of each request", "Traffic", "Tokens", "short", "talk"):
        assert title in text
    assert main(["table", str(file)]) == 0


def test_a_conversation_ends_with_a_turn_that_fails(serve, tmp_path) -> None:
    refused = Reply(((0.0, b"no"),), status=429)
    server = serve(lambda i, served: refused if len(served.body["messages"]) > 1 else chatty(i, served))
    text = "arrivals: {concurrency: 2, requests: 4}\ntraffic: [{name: a, prompt: 5, output: 2, turns: 4}]"
    assert run_scenario(tmp_path, server, text) == 0
    figures = result_of(tmp_path).measurements[0].figures
    assert (figures.num_answers, figures.errors) == (4, {"http_429": 4})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nowhere.yaml"], "no scenario that comes with this one: bursts, chat"),
        (["tenants"], "the environment lacks SMALL_KEY, LARGE_KEY"),
        (["chat", "--api", "completions"], "of the API chat"),
    ],
)
def test_a_scenario_that_cannot_be_run_is_said_in_one_line(options, said, capsys, monkeypatch) -> None:
    monkeypatch.delenv("SMALL_KEY", raising=False)
    monkeypatch.delenv("LARGE_KEY", raising=False)
    assert main(["scenario", *options]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_the_rate_of_a_scenario_can_be_raised(serve, tmp_path) -> None:
    server = serve(chatty)
    assert run_scenario(tmp_path, server, SMALL, "--rate-factor", "3", "--requests", "25") == 0
    session = result_of(tmp_path)
    assert session.measurements[0].figures.num_answers == 25  # of about 60
    assert session.scenarios[0].arrivals == "600/s for 0.1 s"
    assert json.loads((next(tmp_path.glob("*.json"))).read_text())["kind"] == "scenario"


def test_answers_by_token_ids_are_the_same_for_a_scenario_of_completions(serve, tmp_path) -> None:
    server = serve(lambda _, served: whole_answer(served))
    assert run_scenario(tmp_path, server, SMALL + "api: completions") == 0
    assert {len(request.body["prompt"]) for request in server.served} == {5}
