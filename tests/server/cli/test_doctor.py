"""`peregrine doctor` for each kind of kernels: every part of a step has its kernel named."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.planning.triton_check import TRITON_PARTS, describe_triton_kernels
from server.cli.main import main
from tests.support.quantized_files import write_checkpoint
from tests.support.quantizers import gptq

ROOT = Path(__file__).parents[3]


def doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    settings = ["--set", "device.kernels=triton", "--set", "device.name=cpu"]
    command = [sys.executable, "-m", "server.cli", "doctor", *settings]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True)


def test_doctor_names_the_kernel_of_every_part() -> None:
    result = doctor(TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    found = dict(line.strip().split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith("  "))
    assert set(found) == {"linear", *TRITON_PARTS}
    for part, place in TRITON_PARTS.items():
        module, _, name = place.partition(":")
        assert f"{name}, {module.replace('.', '/')}.py" in found[part]
    assert "default.json" in found["attention"]


def test_doctor_refuses_triton_where_nothing_can_run_it() -> None:
    result = doctor()
    assert result.returncode == 2
    assert "no GPU" in result.stderr.splitlines()[-1]


Doctor = Callable[..., tuple[int, dict[str, str], str]]


@pytest.fixture
def run_doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """The command in this process: its exit code, its table, and the last line of its complaints."""

    def run(*settings: str) -> tuple[int, dict[str, str], str]:
        code = main(["doctor", "--set=device.name=cpu", *(f"--set={setting}" for setting in settings)])
        output = capsys.readouterr()
        table = {line[:24].strip(): line[24:].strip() for line in output.out.splitlines()}
        return code, table, output.err.rstrip("\n").rpartition("\n")[2]

    return run


def test_doctor_tells_compiled_layers_from_torch_s(run_doctor: Doctor) -> None:
    (code, ours, _), (_, theirs, _) = run_doctor("device.kernels=numba"), run_doctor("device.kernels=torch")
    assert code == 0
    assert (ours["weight formats"], theirs["weight formats"]) == ("none, fp16, int8, int4", "none, fp16, int8")
    assert ours["linear layers"].startswith("compiled; weights as float16, or what is smaller")
    assert "same program" in ours["attention"]
    assert "torch" not in ours["attention"] + ours["linear layers"]
    assert "gathered blocks" in theirs["attention, decoding"]
    assert run_doctor("device.kernels=numba", "model.quantization=int4")[1]["linear layers"].startswith(
        "compiled; weights as 4 bits"
    )


def test_doctor_and_plan_say_what_becomes_of_a_quantised_checkpoint(
    run_doctor: Doctor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "dynamic": {"+:.*mlp.*": {"bits": 8}}}
    write_checkpoint(tmp_path, {"self_attn": gptq(3), "mlp": gptq(8, symmetric=False)}, config)
    code, table, _ = run_doctor(f"model.path={tmp_path}")
    assert code == 0
    line = "stored as GPTQ, 8 bits, groups of 32: layers.mlp.down_proj (2), layers.mlp.gate_proj (2)"
    assert table["stored weights"].startswith("stored as GPTQ, ")
    assert main(["plan", str(tmp_path), "--set=device.name=cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"note: {line}" in printed
    assert "GPTQ, 3 bits, groups of 32" in printed
    assert "kept as Q4_0, multiplied by compiled integer tiles" in printed
    assert main(["plan", str(tmp_path), "--set=device.name=cpu", "--set=device.kernels=torch"]) == 0
    assert "torch layers read no stored integers" in capsys.readouterr().out


def test_doctor_refuses_what_the_kernels_cannot_do(run_doctor: Doctor) -> None:
    code, _, complaint = run_doctor("device.kernels=numba", "kv_cache.block_size=8")
    assert code == 2
    assert "kv_cache.block_size is 8" in complaint
    assert "set it to 16" in complaint
    assert "supported with torch kernels" in run_doctor("device.kernels=torch", "model.quantization=int4")[2]


def test_a_kernel_that_is_not_there_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRITON_PARTS, "norm", "kernels.triton.layers.norm:nothing_of_this_name")
    parts = describe_triton_kernels(torch.device("cpu"), torch.float32)
    assert parts["norm"].startswith("Triton's interpreter, slow: MISSING")


@pytest.fixture
def namesake(tmp_path: Path) -> Path:
    """A folder with Hugging Face's package `kernels` in it, as pip leaves it, on nobody's path yet."""
    metadata = tmp_path / "kernels-0.18.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    return tmp_path


def test_doctor_says_so_if_another_package_called_kernels_is_installed(
    namesake: Path, monkeypatch: pytest.MonkeyPatch, run_doctor: Doctor
) -> None:
    assert run_doctor("device.kernels=torch")[0] == 0
    monkeypatch.syspath_prepend(namesake)
    code, table, complaint = run_doctor("device.kernels=torch")
    assert code == 2
    assert "kernels 0.18.2 of Hugging Face" in complaint
    assert "pip uninstall kernels" in complaint
    assert "transformers" in table
    assert "cpu" not in table  # which would have imported one of the two


def test_doctor_says_so_where_the_other_package_hides_our_kernels(namesake: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "doctor"]
    path = os.pathsep.join((str(namesake), str(ROOT)))
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=namesake, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "pip uninstall kernels" in result.stderr.splitlines()[-1]
