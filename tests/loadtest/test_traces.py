"""Recorded traces: how they are read, what requests they make, and the command, against a scripted server."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.cli import main
from loadtest.report.session import load
from loadtest.scenarios.sample_trace import files
from loadtest.scenarios.trace_file import Trace, TraceRequest, read_trace
from loadtest.scenarios.traced import TraceWorkload, arrivals_of, with_lengths
from loadtest.workload.prompts import PromptText
from tests import ROOT
from tests.support.scripted_server import whole_answer

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,374,44
2023-11-16 18:17:04.0319600,396,109
2023-11-16 18:17:02.5000000,5,1
2023-11-16 18:17:04.2319600,0,9
"""
MOONCAKE = """{"timestamp": 1500, "input_length": 1100, "output_length": 20, "hash_ids": [46, 47, 48]}
{"timestamp": 1000, "input_length": 600, "output_length": 3, "hash_ids": [46, 99], "chat_id": 5}

"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_azure_s_columns_are_read_in_the_order_of_their_times(tmp_path) -> None:
    trace = read_trace(written(tmp_path, "azure.csv", AZURE))
    assert [request[1:3] for request in trace.requests] == [(5, 1), (374, 44), (396, 109)]
    assert [request.at for request in trace.requests] == pytest.approx([0.0, 1.47996, 1.53196])
    assert trace.num_left_out == 1


@pytest.mark.parametrize(
    "text",
    [
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,7,8,15,API log\n9,x,1,2,3,y\n",
        "\ufeffarrival_timestamp , prompt_size , token_size\n5,7,8\n\n9,1,2\n",
        '"output_tokens","timestamp","input_tokens"\n8,5.0,7\n2,9.0,1\n',
        "timestamp,input_length,output_length\n2024-05-10 00:00:05.0099+00:00,7,8\n2024-05-10T02:00:09.0099+02,1,2\n",
    ],
)
def test_columns_go_by_the_names_that_public_traces_have(text: str, tmp_path) -> None:
    trace = read_trace(written(tmp_path, "other.CSV", text))
    assert [(round(at, 6), prompt, output) for at, prompt, output, _ in trace.requests] == [(0.0, 7, 8), (4.0, 1, 2)]


def test_mooncake_s_lines_have_milliseconds_and_blocks(tmp_path) -> None:
    trace = read_trace(written(tmp_path, "mooncake.jsonl", MOONCAKE))
    assert trace.requests == [TraceRequest(0.0, 600, 3, (46, 99)), TraceRequest(0.5, 1100, 20, (46, 47, 48))]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "", "no column timestamp"),
        ("a.csv", "TIMESTAMP,ContextTokens\n1,2\n", "no column generatedtokens"),
        ("a.csv", AZURE + "2023-11-16 18:17:04.1,12\n", "line 6: 2 columns, where the first line names 3"),
        ("a.csv", AZURE + "soon,12,3\n", "line 6: 'soon' is neither seconds nor a date and time"),
        ("a.csv", AZURE + "2023-11-16 18:17:04.1,twelve,3\n", "line 6: 'twelve' is no number of tokens"),
        ("a.csv", AZURE + "2023-11-16 18:17:04.1,-3,3\n", "line 6: -3 prompt tokens"),
        ("a.csv", "timestamp,input_length,output_length\nnan,3,3\n", "line 2: the time is nan"),
        ("a.csv", "timestamp,input_length,output_length\n1,99999999999,3\n", "99,999,999,999 prompt tokens"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("a.csv", 'timestamp,input_length,output_length\n"' + "x" * 200_000 + '",1,1\n', "line 2"),
        ("a.jsonl", "", "no request"),
        ("a.jsonl", MOONCAKE + "{", "line 4"),
        ("a.jsonl", MOONCAKE + "[1]", "line 4: Expected `object`"),
        ("a.jsonl", MOONCAKE + '{"timestamp": 1, "input_length": 3.5, "output_length": 3}', "`$.input_length`"),
        ("a.jsonl", MOONCAKE + '{"timestamp": 1, "input_length": 3}', "output_length"),
        (
            "a.jsonl",
            MOONCAKE + '{"timestamp": 1, "input_length": 3, "output_length": 3, "hash_ids": ["a"]}',
            "hash_ids",
        ),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(name: str, text: str, said: str, tmp_path, capsys) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(ValueError, match=r"a\.(csv|jsonl)") as refusal:
        read_trace(path)
    assert said in str(refusal.value)
    assert main(["replay", str(path), "--url", "http://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01" * 50, b"timestamp,input_length,output_length\n\xff,1,1\n"])
def test_bytes_that_are_no_text_are_refused(content: bytes, tmp_path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.csv is no text"):
        read_trace(path)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path) -> None:
    with pytest.raises(ValueError, match="is it a trace"):
        read_trace(written(tmp_path, "a.jsonl", "[" * (5 << 20)))


def test_prompts_have_their_lengths_and_share_the_blocks_whose_ids_are_equal() -> None:
    requests = [TraceRequest(0, 1100, 1, (46, 47, 48)), TraceRequest(1, 600, 1, (46, 99)), TraceRequest(2, 1200, 1)]
    workload = TraceWorkload(requests, "t", seed=4)
    first, second, third = (workload.exchange(index).prompt for index in range(3))
    assert [len(prompt) for prompt in (first, second, third)] == [1100, 600, 1200]
    assert first[:512] == second[:512]
    assert first[512:520] != second[512:520]
    assert third[:8] != first[:8]
    assert workload.of_stream(1, None).exchange(0).prompt[:8] != first[:8]  # another round finds nothing in a cache
    longer = TraceWorkload([TraceRequest(0, 700, 1, (46,))], "t", seed=4).exchange(0).prompt
    assert len(longer) == 700  # what no block names is the request's own
    assert longer[:512] == first[:512]


def test_words_stand_for_tokens_where_a_server_takes_text() -> None:
    requests = [TraceRequest(0, 1100, 1, (46, 47, 48)), TraceRequest(1, 600, 1, (46, 99)), TraceRequest(2, 3, 1, (7,))]
    text = PromptText(tokens_of_template=10.0, tokens_per_word=2.0)
    first, second, third = (
        TraceWorkload(requests, "t", 4, text=text).exchange(index).prompt.split() for index in range(3)
    )
    assert first[:256] == second[:256]
    assert [len(first), len(second), len(third)] == pytest.approx([545, 295, 1], abs=1)


def test_parts_speeds_and_lengths_of_a_trace(tmp_path) -> None:
    requests = [TraceRequest(float(i), 100 * (i + 1), 10 * (i + 1)) for i in range(10)]
    trace = Trace("t", requests, 0)
    part = trace.cut(start=2, seconds=4, limit=3)
    assert [request.at for request in part.requests] == [0.0, 1.0, 2.0]
    assert arrivals_of(part, speed=4.0).offsets == [0.0, 0.25, 0.5]
    with pytest.raises(ValueError, match=r"no request from 40 to inf s; its last one is at 9 s"):
        trace.cut(start=40, seconds=None, limit=None)
    small = with_lengths(part, scale=0.01, max_prompt_tokens=4, max_output_tokens=None)
    assert [request[1:3] for request in small.requests] == [(3, 1), (4, 1), (4, 1)]


def test_the_samples_are_what_their_generator_makes() -> None:
    for name, text in files().items():
        assert (ROOT / "loadtest" / "scenarios" / name).read_text() == text
        trace = read_trace(ROOT / "loadtest" / "scenarios" / name)
        assert len(trace.requests) > 30
        assert trace.num_left_out == 0


def test_a_trace_is_replayed_at_its_times_and_lengths(serve, tmp_path, capsys) -> None:
    server = serve(lambda _, served: whole_answer(served))
    path = written(tmp_path, "mooncake.jsonl", MOONCAKE)
    command = ["replay", str(path), "--url", server.url, "--speed", "5", "--warmup", "1", "--seed", "2"]
    assert main([*command, "--results", str(tmp_path), "--max-prompt-tokens", "1000", "--slo", "ttft=9s"]) == 0
    assert "time to first token" in capsys.readouterr().out
    warmup, first, second = server.served
    assert [len(request.body["prompt"]) for request in (warmup, first, second)] == [600, 600, 1000]
    assert [request.body["max_tokens"] for request in (first, second)] == [3, 20]
    assert warmup.body["prompt"] != first.body["prompt"]
    (file,) = tmp_path.glob("*-replay.json")
    session = load(file)
    assert session.scenarios[0].load == "mooncake.jsonl at 5 times its speed, 2 requests in 0.1 s"
    assert [sample.at for sample in session.measurements[0].samples] == pytest.approx([0.0, 0.1])
    assert "<svg" in file.with_suffix(".html").read_text()
