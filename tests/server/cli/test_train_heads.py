"""`peregrine train-heads`, in real processes, on a model of random weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.ipc.messages import EXIT_CODES
from server.cli.main import main
from tests import ROOT

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300,
    "max_position_embeddings": 512,
}  # fmt: skip
SETTINGS = ["--set", "model.load_format=dummy", "--set", "device.kernels=torch", "--set", "kv_cache.memory=16384tokens"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


def command(model: Path, output: Path, *arguments: str) -> list[str]:
    sizes = ["--heads", "2", "--known-tokens", "100", "--markov-rank", "4", "--epochs", "1"]
    start = [sys.executable, "-m", "server.cli", "train-heads", str(model), "--output", str(output)]
    return [*start, *sizes, *SETTINGS, *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=110, check=False
    )


def test_heads_are_trained_on_a_text_and_described(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 600)
    result = run(command(model, tmp_path / "heads", "--text", str(text), "--tokens", "20000"))
    assert result.returncode == 0, result.stderr
    assert "top-1" in result.stdout
    assert f"the heads are in {tmp_path / 'heads'}" in result.stdout
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert (config["num_heads"], config["truncated_vocab_size"], config["hidden_size"]) == (2, 100, 32)


def test_an_interrupt_ends_both_processes_and_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "heads" / "training" / "data"
    with subprocess.Popen(
        command(model, tmp_path / "heads", "--tokens", "1000000"),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT, env=environment(),
        start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 90
        while not list(data.glob("*.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert process.stderr.read().rstrip().endswith("interrupted; the same command goes on from here")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tokens", "many"], "--tokens: 'many' is no number from 1,000 to"),
        (["--heads", "99"], "--heads: '99' is no number from 1 to 16"),
        (["--text", "/nonexistent/text"], "--text: /nonexistent/text cannot be read"),
        (["--tokenz", "3"], "did you mean --tokens?"),
        (["--text", "a", "--self-generate"], "not allowed with"),
        (["--draft", "--heads", "2"], "--heads is for heads; leave it out, or --draft"),
        (["--layers", "2"], "--layers is for draft models; add --draft"),
        (["--draft", "--layers", "0"], "--layers: '0' is no number from 1 to"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    model: Path, tmp_path: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["train-heads", str(model), "--output", str(tmp_path / "heads"), *SETTINGS, *arguments])
    except SystemExit as ending:
        code = ending.code
    assert code == EXIT_CODES["config"]
    line = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
    assert complaint in line
    assert line.startswith("peregrine: ")
