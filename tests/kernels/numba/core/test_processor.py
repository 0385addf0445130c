"""Which vector instructions kernels are compiled for, and that the tiles of every level compute the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kernels.numba.core.processor import LEVELS, features, level
from tests import ROOT

LIMIT = """
import sys
from kernels.numba.core import processor
try:
    processor.limit_to(sys.argv[1])
except ValueError as error:
    print(error)
else:
    print(processor.level().name, *sorted(processor.features()))
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", LEVELS)
def test_products_and_attention_are_right_with_the_tiles_of_every_level(name: str) -> None:
    """Shapes of tiles, with this processor's instructions: those of a higher level are several that do the same."""
    tests = [f"tests/kernels/numba/{part}" for part in ("ops", "program")]
    tests += ["tests/engine/attention/test_numba_backend.py", "tests/engine/models/test_llama_numba.py"]
    done = run("-m", "pytest", "-q", "-x", *tests, PEREGRINE_TILES=name)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", LEVELS)
def test_a_process_is_limited_to_a_level_that_the_processor_has(name: str) -> None:
    done = run("-c", LIMIT, name)
    assert done.returncode == 0, done.stderr
    if level().name in LEVELS and LEVELS.index(name) <= LEVELS.index(level().name):
        found, *left = done.stdout.split()
        assert found == name
        assert set(left) <= features()
        if name == "avx2":
            assert not any(one.startswith(("avx512", "amx")) for one in left)
    else:
        assert done.stdout.strip() == f"this processor's vector instructions are {level().name}"


def test_kernels_that_are_compiled_keep_their_level() -> None:
    done = run("-c", f"import kernels.numba.core.tiles\n{LIMIT}", level().name)
    assert done.stdout.split()[0] == level().name
    if level().name not in ("avx2", "generic"):
        done = run("-c", f"import kernels.numba.core.tiles\n{LIMIT}", "avx2")
        assert done.stdout.strip() == f"kernels were compiled for {level().name} already in this process"
