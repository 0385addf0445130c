"""The measurements for a GPU, on a machine without one: every section runs, and one that fails takes no other along."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from loadtest.gpu import tables
from loadtest.gpu.cli import main
from loadtest.gpu.records import Ceilings, Check, Problem, Record, SectionResult, Session, Timing, Tuned, load
from loadtest.gpu.runner import Settings, run_section
from loadtest.gpu.sections import SECTIONS, Section
from loadtest.gpu.tables import GOALS
from tests import ROOT


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, str, Path]:
    """One run of the whole command: what it kept, what it printed, and where."""
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "loadtest.gpu", "--rehearse", "--minutes", "5", "--results", str(folder)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*-gpu.json")
    return load(path), result.stdout, folder


def section(rehearsal: tuple[Session, str, Path], name: str) -> SectionResult:
    return next(section for section in rehearsal[0].sections if section.name == name)


@pytest.mark.timeout(300)
def test_every_section_is_rehearsed(rehearsal: tuple[Session, str, Path]) -> None:
    assert [section.name for section in rehearsal[0].sections] == list(SECTIONS)
    problems = [record for record in rehearsal[0].records if isinstance(record, Problem)]
    assert {problem.job.partition(",")[0] for problem in problems} <= {"FlashAttention-3"}, problems
    assert isinstance(section(rehearsal, "machine").records[0], Ceilings)


def test_every_kernel_is_checked_and_right(rehearsal: tuple[Session, str, Path]) -> None:
    checks = section(rehearsal, "checks").records
    assert all(isinstance(check, Check) and check.is_ok for check in checks)
    names = " ".join(check.name for check in checks)
    for kernel in ("attention", "store", "norm", "mul", "qkv", "experts", "sampling", "penalties", "log-probabilities"):
        assert kernel in names


def test_every_kernel_is_timed_against_others(rehearsal: tuple[Session, str, Path]) -> None:
    timings = [record for record in section(rehearsal, "kernels").records if isinstance(record, Timing)]
    assert all(timing.seconds > 0 and timing.floor for timing in timings)
    assert {peer for timing in timings for peer in timing.peers} >= {"SDPA", "torch, eager", "torch, by sorting"}


def test_the_tuner_writes_a_table(rehearsal: tuple[Session, str, Path]) -> None:
    tuned = [record for record in section(rehearsal, "tune").records if isinstance(record, Tuned)]
    table = json.loads((rehearsal[2] / "default.json").read_text())
    assert "rehearsal" in table["provenance"]
    assert {record.key: record.config for record in tuned} == table["kernels"]["attention"]


def test_the_engine_is_timed_beside_its_peer_and_over_http(rehearsal: tuple[Session, str, Path]) -> None:
    names = set(rehearsal[0].timings)
    assert names >= {"prefill, tiny, 2 x 24", "decode, tiny, 2 x 24", "decode, tiny, 2 x 24, transformers"}
    assert "time per token, tiny, 2 x 24, over HTTP" in names


def test_the_short_table_comes_last(rehearsal: tuple[Session, str, Path]) -> None:
    last = rehearsal[1].splitlines()
    assert last[-1].endswith("-gpu.json")
    assert all(goal.title in rehearsal[1] for goal in GOALS)
    assert "A rehearsal" in tables.markdown(rehearsal[0])


MISBEHAVING = """
import os, time
from loadtest.gpu.context import Job
from loadtest.gpu.records import Timing

def good(name):
    yield Timing(name, 1.0)

def bad():
    yield Timing("before", 1.0)
    raise ArithmeticError("so it goes")

def dead():
    print("last words")
    os._exit(9)
    yield

def stuck():
    time.sleep(60)
    yield

def jobs(context):
    return [
        Job("first", lambda: good("first")), Job("bad", bad), Job("dead", dead), Job("stuck", stuck),
        Job("last", lambda: good("last")),
    ]
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    monkeypatch.syspath_prepend(tmp_path)
    return Settings([], minutes=1, is_rehearsal=True, seed=0, tables=tmp_path)


def test_a_job_that_fails_dies_or_hangs_takes_no_other_along(settings: Settings) -> None:
    found = run_section(Section(("misbehaving:jobs",), share=1, patience=8), settings, seconds=100, ceilings=None)
    assert [record.name for record in found if isinstance(record, Timing)] == ["first", "before", "last"]
    problems = {record.job: record.text for record in found if isinstance(record, Problem)}
    assert set(problems) == {"bad", "dead", "stuck"}
    assert "ArithmeticError: so it goes" in problems["bad"]
    assert "last words" in problems["dead"]
    assert "nothing was heard" in problems["stuck"]


def test_a_section_ends_in_time_and_has_told_by_then_what_it_found(settings: Settings) -> None:
    """So that a run that is killed leaves all that it had measured."""
    told: list[list[Record]] = []
    section = Section(("misbehaving:jobs",), share=1, patience=1000)
    found = run_section(section, settings, seconds=8, ceilings=None, tell=told.append)
    assert found[-1] == Problem("stuck", "stopped: the section's time was over")
    assert [record.name for record in found if isinstance(record, Timing)] == ["first", "before"]
    assert told[-1] == found[:-1]


def test_each_job_of_a_section_may_have_a_process_of_its_own(settings: Settings) -> None:
    jobs = "from loadtest.gpu.context import Job\nfrom loadtest.gpu.records import Timing\nimport os\n"
    jobs += "def jobs(context):\n    return [Job(n, lambda: iter([Timing(n, os.getpid())])) for n in 'abc']\n"
    (settings.tables / "alone.py").write_text(jobs)
    on_device = replace(settings, is_rehearsal=False)
    found = run_section(Section(("alone:jobs",), share=1, is_fresh=True), on_device, seconds=60, ceilings=None)
    assert len({record.seconds for record in found if isinstance(record, Timing)}) == 3
    found = run_section(Section(("alone:jobs",), share=1), on_device, seconds=60, ceilings=None)
    assert len({record.seconds for record in found if isinstance(record, Timing)}) == 1


@pytest.mark.timeout(120)
def test_a_run_that_is_told_to_end_leaves_what_it_measured_and_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest.gpu", "--rehearse", "--sections", "machine,http"]
    process = subprocess.Popen([*command, "--results", str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("*-gpu.json")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(30) == 143
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=10)  # multiprocessing's tracker ends when it sees that its owner has
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]
    (path,) = tmp_path.glob("*.json")
    assert isinstance(load(path).records[0], Ceilings)


def test_a_section_that_cannot_even_begin_says_so(settings: Settings) -> None:
    (found,) = run_section(Section(("there_is_no_such_module:jobs",), share=1), settings, seconds=60, ceilings=None)
    assert isinstance(found, Problem)
    assert "there_is_no_such_module" in found.text


def test_nan_is_wrong() -> None:
    assert not Check("", float("nan"), 1.0).is_ok
    assert Check("", 0.0, 0.0).is_ok


def test_without_a_file_the_table_says_that_nothing_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", str(tmp_path / "none.json")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(GOALS)
    assert all("not measured yet" in row for row in rows)


def test_the_table_has_fractions_and_ratios(rehearsal: tuple[Session, str, Path]) -> None:
    goal = next(goal for goal in GOALS if goal.peer == "transformers")
    timings = [Timing(goal.timing, 0.004, 0.003, num_tokens=8), Timing(f"{goal.timing}, transformers", 0.008)]
    session = rehearsal[0]
    measured = Session(
        session.command, False, 0, "Some GPU", session.environment, {}, [SectionResult("engine", 1.0, timings)]
    )
    row = next(line for line in tables.markdown(measured).splitlines() if goal.title in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [goal.title, "4.00 ms", "2,000", "0.75", f"{goal.fraction:.2f}", "2.00x transformers"]


def test_wishes_that_cannot_be_met_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--sections", "machine"]) == 2
    assert "--rehearse" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--sections", "nonsense"])
    assert "there is no nonsense" in capsys.readouterr().err
