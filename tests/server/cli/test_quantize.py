"""`peregrine quantize`, and a server on what it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.compression import checkpoint_writer
from engine.ipc.messages import EXIT_CODES
from server.cli.main import main
from tests import ROOT
from tests.support.quantized_files import write_checkpoint
from tests.support.server_process import run_server, save_tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_checkpoint(folder, {}, None)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEREGRINE_CACHE", str(tmp_path / "cache"))


def test_a_server_answers_from_what_the_command_wrote(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny_model(model)
    command = [sys.executable, "-m", "server.cli", "quantize", str(model), str(tmp_path / "output")]
    result = subprocess.run(
        [*command, "--group-size", "32", "--asymmetric"], capture_output=True, text=True, cwd=ROOT, timeout=100,
        check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "int4, groups of 32, zero points: 14 matrices" in result.stdout
    assert result.stdout.endswith(f"the checkpoint is in {tmp_path / 'output'}\n")
    with run_server(tmp_path / "output", tmp_path) as server:
        server.wait_until_ready()
        answer = server.complete("hello", max_tokens=5, temperature=0, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 5
        shown = server.client.get("/v1/server/effective-config").json()
        assert "int4 with zero points" in shown["weights.layers.mlp.down_proj"]["value"]


def test_formats_and_groups_are_those_that_are_asked_for(model: Path, tmp_path: Path) -> None:
    for arguments, bits, group, strategy in (
        ([], 4, 64, "group"),
        (["--format", "int8"], 8, 128, "group"),
        (["--format", "int8", "--group-size", "channel"], 8, None, "channel"),
        (["--format", "fp8"], 8, None, "channel"),
    ):
        output = tmp_path / "-".join(["output", *arguments])
        assert main(["quantize", str(model), str(output), *arguments]) == 0
        config = json.loads((output / "config.json").read_text())["quantization_config"]
        groups = list(config["config_groups"].values())
        assert {(g["weights"]["num_bits"], g["weights"]["strategy"]) for g in groups} == {(bits, strategy)}
        assert max((g["weights"]["group_size"] or 0) for g in groups) == (group or 0)


def test_bits_are_chosen_on_a_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    arguments = ["--bits-per-layer", "4,8", "--size-budget", "bits=6", "--calibration", str(text)]
    assert main(["quantize", str(model), str(tmp_path / "output"), *arguments, "--calibration-tokens", "64"]) == 0
    out = capsys.readouterr().out
    assert "int4, groups of 64" in out
    assert "int8, groups of 64" in out
    assert len(list((tmp_path / "cache" / "sensitivities").glob("*.json"))) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--format", "int3"], "invalid choice: 'int3'"),
        (["--group-size", "48"], "invalid choice: '48'"),
        (["--format", "fp8", "--group-size", "64"], "--group-size is for integers, and --format is fp8"),
        (["--format", "fp8", "--method", "gptq"], "--method gptq is for integers"),
        (["--symmetric", "--asymmetric"], "not allowed with"),
        (["--method", "gptq"], "--method gptq learns from a text of the kind that the model is for; add --calibration"),
        (["--method", "rtn", "--calibration", "x"], "--method rtn learns nothing from --calibration"),
        (["--calibration", "/nonexistent/text"], "--calibration: /nonexistent/text cannot be read"),
        (["--bits-per-layer", "auto", "--size-budget", "1GiB"], "--bits-per-layer learns from a text"),
        (["--bits-per-layer", "auto", "--calibration", "x"], "--bits-per-layer needs --size-budget"),
        (["--size-budget", "1GiB"], "add --bits-per-layer auto"),
        (["--bits-per-layer", "4"], "'4' is neither auto nor two or more of 2 to 8"),
        (["--bits-per-layer", "4,16"], "'4,16' is neither auto"),
        (["--bits-per-layer", "auto", "--calibration", "x", "--size-budget", "small"], "--size-budget is 'small'"),
        (["--calibration-tokens", "0"], "'0' is no number from 16 to"),
        (["--method", "awq", "--calibration", "x", "--observer", "mse"], "--observer is for --method rtn"),
        (["--formt", "int8"], "did you mean --format?"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    model: Path, tmp_path: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["quantize", str(model), str(tmp_path / "output"), *arguments])
    except SystemExit as ending:
        code = ending.code
    assert code == EXIT_CODES["config"]
    line = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
    assert complaint in line
    assert line.startswith("peregrine: ")
    assert not (tmp_path / "output").exists()


def test_a_text_without_words_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("")
    assert main(["quantize", str(model), str(tmp_path / "output"), "--calibration", str(text)]) == EXIT_CODES["config"]
    assert "has less than two tokens" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_the_model_s_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tmp_path / "none.gguf"), str(tmp_path / "output")]) == EXIT_CODES["model"]
    assert "there is no" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(
    number: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        assert list(tmp_path.glob(".output.partial/*.safetensors"))
        os.kill(os.getpid(), number)
        for _ in range(200):  # another thread may have got it; this one is told before long
            time.sleep(0.01)

    monkeypatch.setattr(checkpoint_writer, "round_matrix", stop)
    assert main(["quantize", str(model), str(tmp_path / "output")]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
