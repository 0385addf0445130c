"""`spec`: what is asked, that texts are compared, and what is made of the pairs."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.arguments import parse
from loadtest.cli import main
from loadtest.client.client import Target
from loadtest.client.draft_counters import DraftCounters, read_draft_counters
from loadtest.report.environment import read_environment
from loadtest.report.session import REPEAT_STREAMS, Measurement, Scenario, Session, load
from loadtest.report.speculation import interval_of_median, points_of, speculation_tables
from loadtest.speculation import WORKLOADS
from loadtest.workload.lengths import FixedLength
from loadtest.workload.written import WrittenWorkload
from tests import ROOT
from tests.support.measurements import measurement, server
from tests.support.scripted_server import Reply, ScriptedServer, whole_answer

COMMAND = f"cd '{ROOT}' && exec $PYTHON -m tests.support.drafting_process {{port}} {{speculation}}"
SMALL = ["--concurrency", "1,2", "--pairs", "2", "--requests", "3", "--warmup", "1", "--output", "4", "--seed", "3"]


def written(name: str, *, seed: int = 1, stream: int = 0) -> WrittenWorkload:
    kind = WORKLOADS[name]
    return WrittenWorkload(name, kind.author, FixedLength(8), seed, stream, sends_seeds=kind.temperature > 0)


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_follow_from_the_seed_and_no_two_are_alike(name: str) -> None:
    exchanges = [written(name, stream=stream).exchange(index) for stream in range(10) for index in range(100)]
    assert len({exchange.prompt for exchange in exchanges}) == 1000
    assert [written(name).exchange(index) for index in range(100)] == exchanges[:100]
    assert written(name, seed=2).exchange(0) != exchanges[0]


def test_sampled_requests_ask_the_chat_prompts_with_a_seed_each() -> None:
    chat, sampled = ([written(name).exchange(index) for index in range(50)] for name in ("chat", "sampled"))
    assert [each.prompt for each in chat] == [each.prompt for each in sampled]
    assert {each.seed for each in chat} == {None}
    assert len({each.seed for each in sampled}) == 50


def test_text_to_copy_stands_there_twice_and_begins_again() -> None:
    prompt = written("copy").exchange(0).prompt
    first, second, third = prompt.split("\n")
    assert first == second
    assert first.startswith(third)
    assert 100 <= len(first.split()) <= 130
    assert len(third.split()) == 3


@pytest.mark.parametrize("count", [5, 7, 8, 15])
def test_the_interval_holds_the_median_nine_times_out_of_ten(count: int) -> None:
    random = np.random.default_rng(count)
    intervals = [interval_of_median(sample) for sample in random.exponential(size=(4000, count)).tolist()]
    share = np.mean([low <= np.log(2) <= high for low, high in intervals])
    assert share == pytest.approx(0.90, abs=0.025)


@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=30))
def test_the_interval_lies_around_the_median_and_within_the_values(values: list[float]) -> None:
    low, high = interval_of_median(values)
    assert min(values) <= low * (1 + 1e-12)
    assert low <= median(values) * (1 + 1e-12)
    assert median(values) <= high * (1 + 1e-12)
    assert high <= max(values) * (1 + 1e-12)


def test_few_values_have_no_interval() -> None:
    assert interval_of_median([1.0, 1.1, 1.2, 1.3]) is None


def session_of(workload: str, ratios: dict[str, list[float]], *, concurrency: int = 1) -> Session:
    """`none` makes 100 tokens/s in one turn and 50 in the next; the others follow it with their ratios."""
    name = f"{workload}, concurrency {concurrency}"
    load_ = Scenario(name, "written", "8", concurrency, None, 8, None, workload=workload)
    none = [100.0 / (1 + turn % 2) for turn in range(max(len(of) for of in ratios.values()))]
    runs = [measurement("none", load_, rate, 0.1, round=turn) for turn, rate in enumerate(none)]
    for name, own in ratios.items():
        for turn, (ratio, rate) in enumerate(zip(own, none, strict=False)):
            runs.append(measurement(name, load_, ratio * rate, 0.1 / ratio**2, round=turn))
    servers = [replace(server(name), speculation=f'{{"method":"{name}"}}') for name in ("none", *ratios)]
    return Session("spec", "", 1, read_environment(), servers, [load_], runs)


def test_ratios_are_those_of_runs_of_one_turn() -> None:
    _, point = points_of([session_of("chat", {"ngram": [1.1, 1.2, 1.3]})])
    assert point.ratios == pytest.approx((1.1, 1.2, 1.3))
    assert point.decoding == pytest.approx((1.1**2, 1.2**2, 1.3**2))
    assert (point.ratio, point.method, point.is_auto) == (pytest.approx(1.2), "ngram", True)


def test_a_turn_that_was_disturbed_counts_with_its_repetition() -> None:
    session = session_of("chat", {"ngram": [1.1, 0.2]})
    *kept, last = session.measurements
    repeated = replace(last, round=last.round + REPEAT_STREAMS, figures=kept[-1].figures)
    runs: list[Measurement] = [*kept, replace(last, is_disturbed=True), repeated]
    _, point = points_of([replace(session, measurements=runs)])
    assert point.ratios == pytest.approx((1.1, 2.2))


def test_parts_are_taken_together() -> None:
    parts = [session_of("chat", {"ngram": [1.1, 1.2]}), session_of("chat", {"ngram": [1.3], "suffix": [2.0]})]
    parts.append(session_of("copy", {"ngram": [3.0]}, concurrency=4))
    points = {(point.workload, point.concurrency, point.server): point.ratios for point in points_of(parts)}
    assert points["chat", 1, "ngram"] == pytest.approx((1.1, 1.2, 1.3))
    assert points["chat", 1, "suffix"] == pytest.approx((2.0,))
    assert points["copy", 4, "ngram"] == pytest.approx((3.0,))


def test_goals_are_judged_from_seven_pairs_on() -> None:
    lines = speculation_tables(
        [
            session_of("chat", {"medusa": [1.6] * 7, "ngram": [0.97] * 7}),
            session_of("copy", {"ngram": [1.5] * 7, "suffix": [2.5] * 7}),
            session_of("sampled", {"ngram": [1.2] * 6}),
        ]
    ).splitlines()
    verdicts = {line.split(":")[0]: line for line in lines if line.startswith("* ")}
    assert "not judged by 6 pairs" in verdicts["* auto never below 0.98"]
    assert "0.97 [0.97, 0.97], ngram, chat, concurrency 1" in verdicts["* auto never below 0.98"]
    assert ": met; 1.60" in verdicts["* chat at concurrency 1, medusa, 1.5 or more"]
    assert ": met; best of 2: 2.50" in verdicts["* copy at concurrency 1, ngram or suffix, 2.0 or more"]
    assert "not judged by 6" in verdicts["* sampled at concurrency 1, every method, 1.0 or more"]
    missed = speculation_tables([session_of("chat", {"medusa": [1.4] * 7})])
    assert "medusa, 1.5 or more: NOT MET; 1.40" in missed
    assert "2.0 or more: not measured" in missed


def test_plots_have_a_panel_for_each_workload_and_a_line_for_each_method() -> None:
    specification = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "figures" / "draw.py")
    draw = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(draw)
    sessions = [session_of(name, {"ngram": [1.1] * 7, "other": [1.2] * 2}) for name in ("chat", "copy")]
    counted = [replace(m, drafts=DraftCounters(10, 30, (8, 4, 1))) for m in sessions[0].measurements]
    points = points_of([replace(sessions[0], measurements=counted), sessions[1]])
    for plot in (draw.speed_ups, draw.acceptance):
        figure = plot(points)
        assert [ax.get_title() for ax in figure.axes] == ["chat, greedy", "copying, greedy"]
        assert {"n-grams", "other"} <= {line.get_label() for line in figure.axes[0].lines}
        draw.plt.close(figure)


def spec(folder: Path, *arguments: str) -> int:
    return main(["spec", "--server-command", COMMAND, *SMALL, "--results", str(folder), *arguments])


def test_every_method_is_a_server_that_is_measured_in_turns_with_none(serve, tmp_path, capsys) -> None:
    peer = serve(lambda _, served: whole_answer(served))
    options = ["--workload", "chat,sampled", "--method", "ngram", "--peer", f"plain={peer.url}"]
    assert spec(tmp_path, *options) == 0
    chat, sampled = sorted(tmp_path.glob("*.json"))
    assert (chat.name[18:], sampled.name[18:]) == ("spec-chat.json", "spec-sampled.json")
    assert chat.with_suffix(".html").exists()
    session = load(chat)
    turns = [(run.server, run.turn) for run in session.measurements]
    assert turns == [(name, turn) for turn in range(4) for name in ("none", "ngram", "plain")]
    assert (session.num_compared, session.differences, session.error) == (12, [], "")
    drafts = {run.server: run.drafts for run in session.measurements}
    assert drafts == {"none": DraftCounters(0, 0, ()), "ngram": DraftCounters(4, 8, (4,)), "plain": None}
    assert "{" in session.servers[1].command
    assert sys.executable not in session.servers[0].command
    seeds = [request.body.get("seed") for request in peer.served]
    assert None not in seeds[-16:]
    printed = capsys.readouterr()
    assert "chat, concurrency 2, pair 2 of 2: ngram" in printed.err
    assert "50%, 1.33" in printed.out
    assert "24 answers compared between servers, 0 differ" in printed.out
    assert main(["table", str(chat), str(sampled)]) == 0
    assert capsys.readouterr().out.strip() in printed.out


def test_a_text_that_differs_is_shown_and_fails_the_run(tmp_path, capsys) -> None:
    assert spec(tmp_path, "--workload", "copy", "--method", "wrong") == 1
    printed = capsys.readouterr()
    assert "1 TEXTS DIFFER" in printed.err
    assert "wrong said" in printed.out
    (file,) = tmp_path.glob("*.json")
    assert load(file).differences


def test_a_server_that_dies_ends_the_run_with_what_was_measured(tmp_path, capsys) -> None:
    assert spec(tmp_path, "--method", "dies") == 2
    printed = capsys.readouterr()
    assert "warm-up requests failed" in printed.err
    assert "what was measured before is in the file" in printed.err
    assert "Traceback" not in printed.err
    (file,) = tmp_path.glob("*.json")
    assert "ended early" in printed.out
    assert [run.server for run in load(file).measurements][:2] == ["none", "dies"]


def test_a_signal_ends_the_run_with_what_was_measured(tmp_path) -> None:
    arguments = ["--server-command", COMMAND, *SMALL, "--pairs", "100000", "--results", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "loadtest", "spec", "--method", "ngram", *arguments], stderr=subprocess.PIPE, text=True
    ) as running:
        assert "pair 1 of 100000: none" in running.stderr.readline()
        running.send_signal(signal.SIGTERM)
        _, printed = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "ended by a signal; what was measured before is in the file" in printed
    (file,) = tmp_path.glob("*.json")
    assert load(file).measurements


def test_a_method_that_the_server_does_not_know_is_said_in_its_words(tmp_path, capsys) -> None:
    assert spec(tmp_path, "--method", "unknown") == 2
    printed = capsys.readouterr().err
    assert "unknown ended with status 1" in printed
    assert "there is no such method" in printed
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "x=ngram"], "NAME=JSON"),
        (["--method", 'x={"num_drafts":3}'], 'says "method"'),
        (["--method", 'none={"method":"ngram"}'], "another name"),
        (["--workload", "chat,poems"], "poems: no workload has that name; there are chat, copy, sampled"),
        (["--pairs", "0"], "below 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_can(arguments: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as refusal:
        parse(["spec", *arguments])
    assert refusal.value.code == 2
    assert words in capsys.readouterr().err


VLLM = """# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{engine="0"} 5.0
# TYPE vllm:spec_decode_num_draft_tokens counter
vllm:spec_decode_num_draft_tokens_total{engine="0"} 15.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="2"} 1.0
"""


@pytest.mark.parametrize(
    ("text", "counters"),
    [(VLLM, DraftCounters(5, 15, (4, 0, 1))), ("up 1\n", None), ("{no metrics", None), ('{"data": []}', None)],
)
async def test_drafts_are_counted_by_position_where_a_server_has_them(text: str, counters: object) -> None:
    server = ScriptedServer(lambda *_: Reply(()), metrics=lambda: text)
    try:
        assert await read_draft_counters(Target(server.url)) == counters
    finally:
        server.stop()


def test_counters_since_an_earlier_moment() -> None:
    assert DraftCounters(5, 9, (4, 2)).since(DraftCounters(2, 3, (1,))) == DraftCounters(3, 6, (3, 2))
