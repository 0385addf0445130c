"""Scenarios of operation: their accounts of requests, and some of them played on a server without a model."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from loadtest.cli import main
from loadtest.client.client import Target
from loadtest.client.outcome import Failure
from loadtest.operation import scenarios
from loadtest.operation.account import Account, Crowd
from loadtest.operation.counters import Counters
from loadtest.operation.findings import Findings, OperationResult
from loadtest.operation.leaks import _leaks
from loadtest.operation.load import Load, Run, growth
from loadtest.operation.mixed_traffic import streamed_text
from loadtest.operation.runner import SCENARIOS, about
from loadtest.operation.served import Holdings
from loadtest.operation.stage import Stage, StageOptions
from loadtest.workload.prompts import Exchange
from tests import ROOT
from tests.support.scripted_server import DONE, Reply, event, whole_answer

NEED_A_MODEL = {
    "overload",
    "fairness",
    "mixed_load",
    "clock_jumps",
    "disk_full",
}  # or a machine for themselves, or root
IN_EVERY_RUN = {"engine_killed", "soak"}
PROMPTS = [Exchange(f"prompt {number}", 3) for number in range(2)]


def test_every_scenario_is_a_file_that_says_what_has_to_hold() -> None:
    files = {path.stem for path in Path(scenarios.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(SCENARIOS)
    assert all(about(name).endswith(".") for name in SCENARIOS)


def test_the_list_names_every_scenario(capsys) -> None:
    assert main(["operation", "--list"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == list(SCENARIOS)


def test_an_unknown_scenario_is_told_with_those_that_there_are(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["operation", "flood"])
    assert "engine_killed" in capsys.readouterr().err


# Clients' accounts


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("http_429", "refused"), ("http_503", "refused"), ("http_500", "failed"), ("error_event", "failed"),
        ("disconnect", "broken"), ("connect", "broken"), ("cut", "broken"),
        ("twice", "wrong"), ("unfinished", "wrong"), ("bad_event", "wrong"), ("timeout", "wrong"),
    ],
)  # fmt: skip
def test_an_end_is_entered_once_by_what_it_tells_the_client(kind: str, part: str) -> None:
    account = Account(num_sent=1)
    account.enter(Failure(kind, "why", 0.0, 1.0), None)
    assert getattr(account, part) == {kind: 1}
    assert account.num_ended == 1
    assert f"{part}: 1 {kind}" in account.line()


async def test_an_answer_with_another_text_than_the_undisturbed_one_is_wrong(serve) -> None:
    def script(index: int, served):
        if index == 4:
            end = (0.0, event(finish_reason="length"))
            return Reply(((0.0, event(" another")), end, (0.0, event(usage=(3, 3))), (0.0, DONE)))
        return whole_answer(served)

    crowd = Crowd(Target(serve(script).url, model="scripted"), PROMPTS, num_clients=1)
    await crowd.learn()
    account = await crowd.run(lambda: crowd.account.num_sent == 4)
    assert (account.num_sent, account.num_answered, account.wrong) == (4, 3, {"another text": 1})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "without"),
        (event("a"), "without"),
        (event("a") + DONE, "finish reason"),
        (event("a", finish_reason="stop") + event("b") + DONE, "went on"),
        (b'data: {"error": {"message": "broken"}}\n\n' + DONE, "broken"),
    ],
)
def test_streams_that_are_not_whole_are_told(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        streamed_text(content)
    assert streamed_text(event("a") + event("b", finish_reason="stop") + event(usage=(1, 2)) + DONE) == "ab"


# What a server holds and counts


def holdings(**other: int) -> Holdings:
    usual = {"memory": 10**9, "server_memory": 10**8, "descriptors": 30, "engine_descriptors": 10}
    return Holdings(**{**usual, "processes": 2, "threads": 5, "tasks": 4, **other})


@pytest.mark.parametrize("name", ["memory", "server_memory", "descriptors", "engine_descriptors", "processes", "tasks"])
def test_each_thing_that_a_server_keeps_is_a_leak(name: str) -> None:
    assert _leaks(holdings(), holdings()) == []
    [leak] = _leaks(holdings(), holdings(**{name: 2 * getattr(holdings(), name)}))
    assert leak.startswith(name)


def test_a_server_is_idle_when_all_that_came_has_ended_and_owns_nothing() -> None:
    page = 'peregrine_requests_received_total{{model_name="m"}} {}\nperegrine_requests_total{{status="200"}} 3\n'
    page += 'peregrine_requests_total{{status="499"}} 2\nperegrine_kv_blocks{{state="owned"}} {}\n'
    assert Counters.parse(page.format(5, 0)).is_idle
    assert not Counters.parse(page.format(6, 0)).is_idle
    assert not Counters.parse(page.format(5, 1)).is_idle
    assert Counters.parse(page.format(5, 0)).by_status() == {"200": 3, "499": 2}


def test_growth_is_seen_over_noise() -> None:
    flat = [100.0 + number % 3 for number in range(200)]
    assert abs(growth(flat, begin=0.5)) < 0.01
    assert growth([100.0 + number for number in range(200)], begin=0.5) == pytest.approx(0.38, abs=0.02)
    assert growth([100.0], begin=0.5) == 0.0


def test_goodput_is_of_whole_answers_within_the_arrivals() -> None:
    assert Run([], 0.0, 10.0).tokens_per_second == 0.0
    failures = [Failure("http_429", "", 0.0, 1.0), Failure("cut", "", 0.0, 1.0)]
    run = Run(failures, 0.0, 10.0)
    assert (len(run.failures("http_429")), run.other_failures) == (1, {"cut": 1})


async def test_a_server_that_answers_nothing_has_no_capacity_to_multiply(tmp_path: Path) -> None:
    load = Load(Stage(StageOptions(), tmp_path), Target("http://127.0.0.1:1"), prompt="8", output="4")
    with pytest.raises(RuntimeError, match="longer --duration"):
        await load.open(3.0 * Run([], 0.0, 10.0).answers_per_second, 5.0)


def test_a_result_is_good_if_something_was_asserted_and_all_of_it_holds() -> None:
    findings = Findings()
    assert not result(findings).is_good
    findings.check("one", True, 1.0)
    assert result(findings).is_good
    assert not result(findings, error="ended by a signal").is_good
    findings.check("two", False, "3 of 4")
    assert not result(findings).is_good


def result(findings: Findings, error: str = "") -> OperationResult:
    return OperationResult("operation", "s", "", "", None, {}, 1.0, findings.checks, findings.figures, error)


# Whole scenarios, on a server without a model

Play = Callable[..., OperationResult]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Plays one scenario by the command line; the result file that it wrote, whose statements all hold."""

    def run(name: str, *options: str) -> OperationResult:
        given = ["--engine", "counting", "--clients", "8", "--output", "24", "--results", str(tmp_path), *options]
        code = main(["operation", name, *given])
        [file] = tmp_path.glob("*.json")
        kept = msgspec.json.decode(file.read_bytes(), type=OperationResult)
        assert [check for check in kept.checks if not check.holds] == []
        assert (kept.error, code) == ("", 0)
        assert len(kept.checks) >= 3
        return kept

    return run


def test_killed_engines_and_their_requests(play: Play) -> None:
    assert play("engine_killed", "--duration", "1").figures["num_sent"] > 0


def test_a_short_soak_counts_what_its_clients_do(play: Play) -> None:
    assert play("soak", "--duration", "4").figures["statuses"]["401"] > 0


def test_a_scenario_that_cannot_be_played_says_why(capsys) -> None:
    assert main(["operation", "clock_jumps", "--engine", "counting"]) == 2
    assert "use --engine default" in capsys.readouterr().out


@pytest.mark.slow  # half a minute each
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in NEED_A_MODEL | IN_EVERY_RUN])
def test_other_scenarios(play: Play, name: str) -> None:
    play(name, "--duration", "5")


def test_a_scenario_that_is_ended_by_a_signal_leaves_no_server_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest", "operation", "soak", "--engine", "counting", "--duration", "60"]
    command += ["--results", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        family: list[psutil.Process] = []
        while not any("engine.process" in " ".join(one.cmdline()) for one in family):
            assert process.poll() is None
            time.sleep(0.1)
            family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(60) == 2
    assert psutil.wait_procs(family, timeout=10)[1] == []
    [file] = tmp_path.glob("*.json")
    assert msgspec.json.decode(file.read_bytes(), type=OperationResult).error == "ended by a signal"
