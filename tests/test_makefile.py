"""The first command on a stranger's machine: what make does before there is an environment."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def python_that(checkout: Path, fails_at: str, leaves: str = "") -> str:
    """A Python interpreter that exits with 1 where its arguments contain a text, as some distributions' do."""
    script = checkout / "python"
    script.write_text(f'#!/bin/sh\ncase "$*" in *{fails_at}*) {leaves} exit 1;; esac\n')
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    return str(script)


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--directory", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_python_that_cannot_make_environments_is_told_which_package_is_missing(checkout: Path) -> None:
    result = make(checkout, "serve", f"PYTHON={python_that(checkout, 'ensurepip')}")
    assert result.returncode != 0
    assert "apt install python3-venv" in result.stderr
    assert not (checkout / ".venv").exists()


def test_an_environment_that_could_not_be_finished_is_not_left_behind(checkout: Path) -> None:
    half_made = "mkdir -p .venv/bin; touch .venv/bin/python .venv/pyvenv.cfg;"
    result = make(checkout, "serve", f"PYTHON={python_that(checkout, '--clear', half_made)}")
    assert result.returncode != 0
    assert not (checkout / ".venv").exists()


def test_an_environment_that_an_interrupted_make_left_is_made_anew(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").touch()
    assert "-m venv --clear" in make(checkout, "--dry-run", "serve").stdout


@pytest.mark.parametrize(("gpu", "extra"), [("1", ".[gpu]"), ("", ".")])
def test_torch_comes_from_its_cpu_index_only_where_there_is_no_gpu(checkout: Path, gpu: str, extra: str) -> None:
    plan = make(checkout, "--dry-run", "serve", f"GPU={gpu}").stdout
    assert ("download.pytorch.org/whl/cpu" in plan) == (not gpu)
    assert f"--editable '{extra}'" in plan


def test_an_install_without_a_network_says_so(checkout: Path) -> None:
    bin_directory = checkout / ".venv" / "bin"
    bin_directory.mkdir(parents=True)
    (bin_directory / "activate").touch()
    shutil.copy(python_that(checkout, "install"), bin_directory / "python")
    result = make(checkout, "serve", "GPU=")
    assert result.returncode != 0
    assert "default index" in result.stdout
    assert "it takes a network" in result.stderr
