"""The comparison with AIPerf: against a scripted server, and a program that says what AIPerf would say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest

from loadtest.agreement import Agreement, Reading, main, ratios_of
from tests.support.scripted_server import whole_answer

TRACE = """{"timestamp": 0, "input_length": 40, "output_length": 3}
{"timestamp": 40, "input_length": 60, "output_length": 2}
"""
PROGRAM = """#!{python}
import json, pathlib, sys
if sys.argv[1:] == ["--version"]:
    print("0.99")
    sys.exit()
options = dict(zip(sys.argv[2::1], sys.argv[3::1]))
lines = pathlib.Path(options["--input-file"]).read_text()
with open("{seen}", "a") as seen:
    seen.write(lines)
average = lambda value: {{"avg": value, "unit": "x"}}
figures = {{"request_count": average(2.0), "time_to_first_token": average(50.0), "inter_token_latency": average(10.0),
    "output_token_throughput": average(100.0), "others": {{"p99": 1}}}}
{end}
pathlib.Path(options["--output-artifact-dir"], "profile_export_aiperf.json").write_text(json.dumps(figures))
"""


def program(folder: Path, *, end: str = "") -> Path:
    path = folder / "aiperf"
    path.write_text(PROGRAM.format(python=sys.executable, seen=folder / "seen.jsonl", end=end))
    path.chmod(0o755)
    (folder / "trace.jsonl").write_text(TRACE)
    return path


def compare(folder: Path, url: str, aiperf: Path) -> int:
    result = str(folder / "result.json")
    options = ["--aiperf", str(aiperf), "--tokenizer", "folder", "--url", url, "--pairs", "2", "--json", result]
    return main([str(folder / "trace.jsonl"), *options])


def test_both_replay_the_same_trace_in_turns_with_texts_that_never_come_twice(serve, tmp_path, capsys) -> None:
    server = serve(lambda _, served: whole_answer(served, gap=0.001))
    assert compare(tmp_path, server.url, program(tmp_path)) == 1  # what the program says is far from what is measured
    result = msgspec.json.decode((tmp_path / "result.json").read_bytes(), type=Agreement)
    assert [(each.tool, each.pair) for each in result.readings] == [
        ("loadtest", 0), ("aiperf", 0), ("aiperf", 1), ("loadtest", 1),
    ]  # fmt: skip
    assert (result.aiperf, result.server, result.num_requests) == ("0.99", "scripted 7.8.9", 2)
    assert {each.output_tokens_per_second for each in result.readings if each.tool == "aiperf"} == {100.0}
    theirs = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert [(line["timestamp"], line["output_length"]) for line in theirs] == [(0, 3), (40, 2)] * 2
    ours = [request.body["prompt"] for request in server.served[2:]]  # after the two that words are counted by
    texts = [line["text_input"] for line in theirs] + ours
    assert len(set(texts)) == len(texts) == 8
    assert "AIPerf's over ours" in capsys.readouterr().out


def test_what_aiperf_printed_last_is_shown_where_it_fails(serve, tmp_path, capsys) -> None:
    server = serve(lambda _, served: whole_answer(served))
    assert compare(tmp_path, server.url, program(tmp_path, end="sys.exit('no such tokenizer')")) == 2
    printed = capsys.readouterr().err
    assert "loadtest.agreement: aiperf ended with status 1: no such tokenizer" in printed
    assert "Traceback" not in printed


def test_figures_agree_by_the_median_of_the_pairs() -> None:
    def reading(tool: str, pair: int, first: float, each: float, rate: float) -> Reading:
        return Reading(tool, pair, 5, first, each, rate)

    readings = [
        reading("loadtest", 0, 1.0, 0.1, 50.0), reading("aiperf", 0, 1.02, 0.1, 49.0),
        reading("aiperf", 1, 9.0, 0.11, 50.0), reading("loadtest", 1, 1.0, 0.1, 50.0),
        reading("loadtest", 2, 2.0, 0.1, 50.0), reading("aiperf", 2, 2.02, 0.099, 51.0),
        reading("loadtest", 3, 2.0, 0.1, 50.0),
    ]  # fmt: skip
    assert ratios_of(readings) == pytest.approx(
        {"time_to_first_token": 1.02, "time_per_output_token": 1.0, "output_tokens_per_second": 1.0}
    )
