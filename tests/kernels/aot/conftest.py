"""Runs the compiler in processes of their own: in this one triton may have been imported for the interpreter."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Compiled:
    """One kernel as a chip would run it; see `offline_compiler.Compiled`."""

    case: str
    kernel: str
    num_warps: int
    registers: int
    stack: int
    local: int
    shared: int
    instructions: dict[str, int]


@pytest.fixture(scope="session")
def compile_kernels() -> Callable[[str, int, str], list[Compiled]]:
    """Runs a script of this folder for a chip and a set of cases."""

    @functools.cache
    def compiled(script: str, arch: int, cases: str) -> list[Compiled]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": f"{HERE.parents[2]}:{HERE}", "TRITON_DEFAULT_FP_FUSION": "1"}
        command = [sys.executable, str(HERE / script), str(arch), cases]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return [Compiled(**fields) for fields in json.loads(result.stdout)]

    return compiled
