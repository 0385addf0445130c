"""`peregrine run-batch` in real processes, around an engine without a model, and against a server that runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.ipc.messages import EXIT_CODES
from server.cli.batch_work import NOT_ENDED, SOME_FAILED
from server.cli.main import main
from tests import ROOT
from tests.support import counting_engine
from tests.support.server_process import free_port

COUNTING = [sys.executable, counting_engine.__file__]
NAMED = ("--served-model-name", "tiny")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def line(number: int, **fields: object) -> dict[str, object]:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3, **fields}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return path


def begin(*arguments: object) -> subprocess.Popen[str]:
    command = [*COUNTING, "run-batch", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment())


def run(*arguments: object) -> tuple[int, str]:
    process = begin(*arguments)
    _, told = process.communicate(timeout=60)
    return process.returncode, told


def answers(path: Path) -> dict[str | None, dict]:
    """By custom_id, each of which must be there once."""
    lines = [json.loads(each) for each in path.read_text().splitlines()]
    found = {each["custom_id"]: each for each in lines}
    assert len(found) == len(lines)
    return found


def wait_for_lines(process: subprocess.Popen[str], path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[str]:
    port = free_port()
    command = [*COUNTING, *arguments, "--port", str(port), *NAMED]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment()
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_lines_are_answered_and_errors_end_nothing(tmp_path):
    lines = [line(1), "{", line(2, temperature=9), line(3, model="other"), line(1), "", line(4)]
    source, target = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    code, told = run(source, target, "counting", *NAMED)
    assert code == SOME_FAILED, told
    assert "6 of 6 lines are in" in told
    assert "4 of them with errors" in told
    lines = [json.loads(each) for each in target.read_text().splitlines()]
    by_number = {(each["custom_id"], (each["error"] or {}).get("line")): each for each in lines}
    assert len(by_number) == len(lines) == 6
    good = by_number["line-1", None]["response"]
    assert good["status_code"] == 200
    assert good["body"]["choices"][0]["text"] == "012"
    assert by_number["line-4", None]["response"]["status_code"] == 200
    assert by_number["line-2", None]["response"]["status_code"] == 400
    assert by_number["line-3", None]["response"]["status_code"] == 404
    assert by_number[None, 2]["error"]["code"] == "invalid_json"
    assert by_number["line-1", 5]["error"]["code"] == "duplicate_custom_id"
    before = target.read_bytes()
    code, told = run(source, target, "counting?fail=model", *NAMED)
    assert (code, target.read_bytes()) == (SOME_FAILED, before), "nothing is left, so no engine is started"


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    source, target = write(tmp_path / "in.jsonl", *(line(n) for n in range(200))), tmp_path / "out.jsonl"
    process = begin(source, target, "counting?delay=0.02", *NAMED, "--concurrency", 4)
    wait_for_lines(process, target, 10)
    process.kill()
    process.communicate()
    kept = target.read_bytes()
    assert kept.count(b"\n") < 200
    target.write_bytes(kept[:-7])
    whole = kept[: kept.rindex(b"\n", 0, -1) + 1]
    code, told = run(source, target, "counting?delay=0", *NAMED)
    assert code == 0, told
    assert target.read_bytes().startswith(whole)
    assert set(answers(target)) == {f"line-{n}" for n in range(200)}


def test_a_signal_lets_lines_in_work_finish(tmp_path):
    source, target = write(tmp_path / "in.jsonl", *(line(n, max_tokens=20) for n in range(200))), tmp_path / "out.jsonl"
    process = begin(source, target, "counting?delay=0.02", *NAMED, "--concurrency", 4)
    wait_for_lines(process, target, 4)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "goes on from here" in told
    assert "Traceback" not in told
    found = answers(target)
    assert 4 <= len(found) < 200
    assert all(each["response"]["status_code"] == 200 for each in found.values())
    assert target.read_bytes().endswith(b"\n")


def test_a_second_signal_ends_it_at_once(tmp_path):
    source, target = write(tmp_path / "in.jsonl", line(1), line(2, max_tokens=4000)), tmp_path / "out.jsonl"
    process = begin(source, target, "counting?delay=0.05", *NAMED, "--shutdown-timeout", 600)
    wait_for_lines(process, target, 1)
    process.send_signal(signal.SIGINT)
    while "stopping" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in told
    assert set(answers(target)) == {"line-1"}


def test_lines_of_another_input_are_not_counted_and_hide_no_error(tmp_path):
    first = write(tmp_path / "a.jsonl", line(1), "{bad")
    second, target = write(tmp_path / "b.jsonl", line(2), "{worse"), tmp_path / "out.jsonl"
    with serving("counting?delay=0") as url:
        run(first, target, "--url", url)
        code, told = run(second, target, "--url", url)
        assert (code, "2 of 2 lines" in told, "2 lines of" in told) == (SOME_FAILED, True, True)
        assert len(target.read_text().splitlines()) == 4
        write(second, line(2), line(3))
        code, told = run(second, target, "--url", url)
        assert (code, "2 of 2 lines" in told, "with errors" in told) == (0, True, False)


@pytest.mark.parametrize(
    ("url", "key"), [("http://[::1", "a"), ("http://127.0.0.1:x", "a"), ("http://", "a"), ("http://a", "ключ")]
)
def test_an_address_or_a_key_that_cannot_be_is_named(tmp_path, monkeypatch, capsys, url, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    source, target = write(tmp_path / "in.jsonl", line(1)), tmp_path / "out.jsonl"
    assert main(["run-batch", str(source), str(target), "--url", url]) == EXIT_CODES["config"]
    assert ("API key" if key != "a" else url) in capsys.readouterr().err


def test_an_engine_that_fails_is_told_as_by_serve(tmp_path):
    source, kind = write(tmp_path / "in.jsonl", line(1)), "memory"
    code, told = run(source, tmp_path / "out.jsonl", f"counting?fail={kind}", *NAMED)
    assert code == EXIT_CODES[kind]
    assert f"{kind}: a failure of the {kind} was ordered" in told.splitlines()[-1]
    assert list(answers(tmp_path / "out.jsonl")) == []


def test_a_server_that_runs_answers_too(tmp_path):
    source, target = write(tmp_path / "in.jsonl", *(line(n) for n in range(30)), line(99, n=0)), tmp_path / "out.jsonl"
    code, told = run(source, target, "--url", f"http://127.0.0.1:{free_port()}")
    assert (code, target.read_bytes()) == (NOT_ENDED, b"")
    assert "no server answers at" in told
    with serving("counting?delay=0", "--api-key", "secret") as url:
        code, told = run(source, target, "--url", url, "--api-key", "secret", "--patience", 60)
        deadline = time.monotonic() + 30
        while code == NOT_ENDED and "no server answers" in told and time.monotonic() < deadline:  # not yet
            code, told = run(source, target, "--url", f"{url}/v1/", "--api-key", "secret", "--patience", 60)
        assert code == SOME_FAILED, told
        found = answers(target)
        assert len(found) == 31
        assert [name for name, each in found.items() if each["response"]["status_code"] != 200] == ["line-99"]
        assert all(each["response"]["request_id"] for each in found.values())
        other = tmp_path / "other.jsonl"
        code, told = run(source, other, "--url", url, "--api-key", "wrong")
        assert (code, other.read_bytes()) == (NOT_ENDED, b"")
        assert "valid API key" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.jsonl", "out.jsonl", "counting"), "missing.jsonl: No such file"),
        (("in.jsonl", "in.jsonl", "counting"), "both the input and the output"),
        (("in.jsonl", "precious.txt", "counting"), "no file of answers"),
        (("in.jsonl", "missing/out.jsonl", "counting"), "No such file"),
        (("in.jsonl", ".", "counting"), "no regular file"),
        ((".", "out.jsonl", "counting"), "Is a directory"),
        (("in.jsonl", "out.jsonl", "counting", "--url", "http://x"), "exclude each other"),
        (("in.jsonl", "out.jsonl", "--url", "localhost:8000"), "must be the address of a server"),
        (("in.jsonl", "out.jsonl", "--concurrency", "0"), "no number from 1"),
        (("in.jsonl",), "required: OUT"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", line(1))
    (tmp_path / "precious.txt").write_text("precious")
    assert main(["run-batch", *arguments]) == EXIT_CODES["config"]
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "precious.txt").read_text() == "precious"
