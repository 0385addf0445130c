"""The commands as users run them, against scripted servers."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from loadtest.arguments import parse
from loadtest.cli import main
from loadtest.planning import PeerText, parse_peer
from loadtest.report.page import html_page
from loadtest.report.session import Session, load
from tests.support.scripted_server import Reply, whole_answer

SMALL = ["--prompt", "8", "--output", "4", "--seed", "3", "--warmup", "1"]


def results_of(folder: Path) -> Session:
    (file,) = folder.glob("*.json")
    return load(file)


def test_run_prints_every_figure_and_nothing_of_progress(serve, tmp_path, capsys) -> None:
    server = serve(lambda _, served: whole_answer(served, gap=0.001))
    file = tmp_path / "run.json"
    options = ["--concurrency", "2", "--requests", "6", "--slo", "ttft=5,itl=5", "--json", str(file)]
    assert main(["--url", server.url, *SMALL, *options]) == 0
    printed = capsys.readouterr()
    for name in ("output tokens/s", "requests/s", "goodput", "time to first token", "inter-token", "end to end"):
        assert name in printed.out
    assert printed.err == ""  # a progress line is for terminals
    session = load(file)
    figures = session.measurements[0].figures
    assert (figures.num_answers, figures.num_output_tokens, figures.num_prompt_tokens) == (6, 24, 48)
    assert (session.servers[0].model, session.servers[0].version, session.seed) == ("scripted", "7.8.9", 3)
    assert session.environment.num_cores >= 1
    assert session.environment.date.startswith("20")
    assert {len(request.body["prompt"]) for request in server.served} == {8}


def test_run_writes_json_to_standard_output_alone(serve, capsys) -> None:
    server = serve(lambda _, served: whole_answer(served))
    assert main(["--url", server.url, *SMALL, "--rate", "500", "--requests", "5", "--json", "-"]) == 0
    session = json.loads(capsys.readouterr().out)
    assert session["scenarios"][0]["rate"] == 500
    assert session["measurements"][0]["figures"]["num_answers"] == 5


def test_errors_are_shown_with_an_example(serve, capsys) -> None:
    refused = Reply(((0.0, b"queue is full"),), status=429)
    server = serve(lambda i, served: refused if i % 2 else whole_answer(served))
    assert main(["--url", server.url, *SMALL, "--warmup", "0", "--concurrency", "1", "--requests", "4"]) == 0
    printed = capsys.readouterr().out
    assert "2 failed" in printed
    assert "http_429" in printed
    assert "queue is full" in printed


def test_no_answer_at_all_is_an_exit_status(serve, capsys) -> None:
    refused = Reply(((0.0, b"queue is full"),), status=503)
    server = serve(lambda *_: refused)
    assert main(["--url", server.url, *SMALL, "--warmup", "0", "--requests", "2"]) == 1
    assert main(["--url", server.url, *SMALL, "--requests", "2"]) == 2
    assert "warm-up" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_said_in_one_line(capsys) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert main(["--url", f"http://127.0.0.1:{unused.getsockname()[1]}"]) == 2
    printed = capsys.readouterr().err
    assert "is the server up?" in printed
    assert printed.count("\n") == 1


def compare(folder: Path, *arguments: str) -> int:
    return main(["compare", *SMALL, "--results", str(folder), "--name", "test", *arguments])


def test_compare_alternates_between_the_servers_with_the_same_prompts(serve, tmp_path) -> None:
    servers = [serve(lambda _, served: whole_answer(served)) for _ in range(3)]
    peers = [f"--peer={name}={server.url}" for name, server in zip("abc", servers, strict=True)]
    rounds = ["--rounds", "2", "--concurrency", "1", "--requests", "3", "--warmup", "0"]
    assert compare(tmp_path, *peers, *rounds) == 0
    events = sorted((r.received_at, name) for name, server in zip("abc", servers, strict=True) for r in server.served)
    assert "".join(name for _, name in events) == "aaabbbcccaaabbbccc"
    prompts = [[tuple(request.body["prompt"]) for request in server.served] for server in servers]
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(set(prompts[0])) == 6  # the second round finds nothing in a cache
    session = results_of(tmp_path)
    assert [(m.server, m.round) for m in session.measurements] == [(n, r) for r in (0, 1) for n in "abc"]


def test_compare_speaks_to_each_server_in_its_own_way(serve, tmp_path) -> None:
    ours, theirs = (serve(lambda _, served: whole_answer(served)) for _ in range(2))
    extra = '{"generation_config":"{\\"eos_token_id\\": -1}","ignore_eos":null}'
    peers = [f"--peer=ours={ours.url}", f"--peer=theirs={theirs.url}/v1,model=big,extra={extra},ignore_eos=elsewhere"]
    assert compare(tmp_path, *peers, "--rounds", "1", "--concurrency", "1", "--requests", "1") == 0
    own, other = ours.served[0].body, theirs.served[0].body
    assert (own["model"], own["ignore_eos"]) == ("scripted", True)
    assert other["model"] == "big"
    assert "ignore_eos" not in other
    assert json.loads(other["generation_config"]) == {"eos_token_id": -1}


def test_compare_writes_ratios_a_page_and_a_table(serve, tmp_path, capsys) -> None:
    """The second server takes ten times as long per token: the ratios say so."""
    fast = serve(lambda _, served: whole_answer(served, gap=0.01))
    slow = serve(lambda _, served: whole_answer(served, gap=0.1))
    peers = [f"--peer=fast={fast.url},pid={os.getpid()}", f"--peer=slow={slow.url}"]
    load_ = ["--rounds", "2", "--concurrency", "1,2", "--requests", "2", "--prefill", "32", "--prefill-requests", "2"]
    assert compare(tmp_path, *peers, *load_) == 0
    printed = capsys.readouterr().out
    assert "ratio to fast" in printed
    session = results_of(tmp_path)
    assert [s.name for s in session.scenarios] == ["concurrency 1", "concurrency 2", "prefill 32"]
    assert all(m.memory for m in session.measurements if m.server == "fast")

    (file,) = tmp_path.glob("*.json")
    assert main(["table", str(file)]) == 0
    tables = [part.splitlines() for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    rows = {line.split(" | ")[0].strip("| *"): line.split(" | ")[1:] for line in tables[0]}
    assert len(tables) == 2
    assert list(rows)[2:] == ["fast", "slow", "fast at its best / best of the peers"]
    first, _, prefill, memory = rows["fast at its best / best of the peers"]
    assert 3 < float(first.split()[0]) < 12
    assert float(rows["slow"][2].replace(",", "")) > 0 < float(prefill)
    assert memory.strip(" |") == "-"  # the other's is not known

    page = file.with_suffix(".html").read_text()
    assert not re.search(r"<(script|link|img|image)|src=|href=\"[^#]", page)  # nothing to load, nothing to follow


def test_a_table_of_something_else_is_refused(tmp_path, capsys) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"kind": 3}')
    assert main(["table", str(file)]) == 2
    assert "no result" in capsys.readouterr().err


def test_sweep_draws_every_point_in_well_formed_svg(serve, tmp_path) -> None:
    server = serve(lambda _, served: whole_answer(served, first=0.005, gap=0.002))
    options = ["--concurrency", "1,2,4", "--requests", "4", "--results", str(tmp_path)]
    assert main(["sweep", "--url", server.url, *SMALL, *options]) == 0
    page = html_page(results_of(tmp_path))
    picture = ElementTree.fromstring("<svg" + page.split("<svg")[1].split("</svg>")[0] + "</svg>")
    groups = {group.get("id"): group for group in picture.iter("{http://www.w3.org/2000/svg}g")}
    names = [f"server, {kind} {p}, ms" for kind in ("ITL", "TTFT", "e2e") for p in ("p50", "p99")]
    width, height = (float(size) for size in picture.get("viewBox").split()[2:])
    for name in [*names, "server"]:
        points = list(groups[name].iter("{http://www.w3.org/2000/svg}use"))
        assert len(points) == 3, name
        for point in points:
            assert 0 <= float(point.get("x")) <= width
            assert 0 <= float(point.get("y")) <= height


def test_keys_do_not_get_into_files(serve, tmp_path) -> None:
    server = serve(lambda _, served: whole_answer(served))
    peer = f"--peer=a={server.url},api_key=sesame1,model=m"
    load_ = ["--rounds", "1", "--concurrency", "1", "--requests", "1"]
    assert compare(tmp_path, peer, "--api-key", "sesame2", "--api-key=sesame3", *load_) == 0
    assert server.served[0].headers["authorization"] == "Bearer sesame1"
    for file in tmp_path.iterdir():
        assert "sesame" not in file.read_text()


def test_peers_are_read_as_they_are_written() -> None:
    peer = parse_peer('x=https://h:1/v1,model=a/b,extra={"s":"a,b}","o":{"k":[1,2]}},api=chat')
    options = {"model": "a/b", "extra": '{"s":"a,b}","o":{"k":[1,2]}}', "api": "chat"}
    assert peer == PeerText("x", "https://h:1/v1", options)


@pytest.mark.parametrize("text", ["x", "x=localhost:3", "=http://h", "x=http://h,colour=red", "x=http://h,extra={1"])
def test_a_peer_that_is_none_says_why(text: str) -> None:
    with pytest.raises(ValueError, match=r"peer|JSON"):
        parse_peer(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--concurrency", "0"],
        ["--rate", "0"],
        ["--rate", "2", "--concurrency", "2"],
        ["--prompt", "many"],
        ["--extra-body", "[1]"],
        ["--slo", "x=1"],
        ["--token-ids", "9"],
        ["compare"],
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_sent(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as refusal:
        parse(arguments)
    assert refusal.value.code == 2
    assert "error" in capsys.readouterr().err


def test_two_peers_of_one_name_are_refused(capsys) -> None:
    assert main(["compare", "--peer", "a=http://127.0.0.1:1", "--peer", "a=http://127.0.0.1:2"]) == 2
    assert "same name" in capsys.readouterr().err


def test_the_load_generator_needs_nothing_of_the_server_it_measures() -> None:
    code = "import sys, loadtest.cli; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"server", "engine", "kernels", "torch", "transformers"} & set(loaded)


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [(["table", "f.json"], "tabulate"), (["run"], "tabulate"), (["compare", "--peer", "a=http://h"], "matplotlib")],
)
def test_what_an_extra_would_bring_is_asked_for_in_one_line_before_anything_is_measured(
    arguments: list[str], missing: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as refusal:
        main(arguments)
    printed = capsys.readouterr().err
    assert refusal.value.code == 2
    assert re.search(rf"needs {missing}.*pip install .*\[loadtest\]", printed)
    assert printed.count("\n") == 1
