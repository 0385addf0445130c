"""`peregrine doctor` for each kind of kernels: every part of a step has its kernel named."""

import os
import subprocess
import sys

import pytest
import torch

from engine.triton_parts import TRITON_PARTS, describe_triton_kernels


def doctor(*settings: str, kernels: str = "triton", **environment: str) -> subprocess.CompletedProcess[str]:
    set_ = [f"--set={setting}" for setting in (f"device.kernels={kernels}", "device.name=cpu", *settings)]
    command = [sys.executable, "-m", "server.cli", "doctor", *set_]
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


def parts_of(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("  ")]
    return {line[2:24].strip(): line[24:].strip() for line in lines}


def test_doctor_tells_compiled_layers_from_torch_s() -> None:
    compiled, torch_s = doctor(kernels="numba"), doctor(kernels="torch")
    assert "int8, int4" in compiled.stdout
    assert "int4" not in torch_s.stdout
    ours, theirs = parts_of(compiled), parts_of(torch_s)
    assert ours["linear layers"].startswith("compiled; weights as float16, or what is smaller")
    assert "same program" in ours["attention"]
    assert "torch" not in ours["attention"] + ours["linear layers"]
    assert "gathered blocks" in theirs["attention, decoding"]


def test_doctor_refuses_what_compiled_layers_cannot_do() -> None:
    result = doctor("kv_cache.block_size=8", kernels="numba")
    assert result.returncode == 2
    assert 'block_size 8, no multiple of 16; set it to "auto" or "torch"' in result.stderr
    assert "supported with torch kernels" in doctor("model.quantization=int4", kernels="torch").stderr


def test_a_kernel_that_is_not_there_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRITON_PARTS, "norm", "kernels.triton.norm:nothing_of_this_name")
    parts = describe_triton_kernels(torch.device("cpu"), torch.float32)
    assert parts["norm"].startswith("Triton's interpreter, slow: MISSING")
