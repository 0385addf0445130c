"""Compiled kernels on disk: read when whole, made again when damaged, done without where there is no place."""

from __future__ import annotations

import logging
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kernels.numba.kernel_cache import KernelFolder, by_name, cache_directory, kernel
from tests import ROOT


def compiled(folder: KernelFolder) -> Callable[[int], int]:
    @kernel("int64(int64)", folder=folder)
    def triple(number):
        return 3 * number

    return triple


def was_read(function) -> bool:
    return sum(function.stats.cache_hits.values()) == 1


def the_file(folder: Path) -> Path:
    [file] = folder.iterdir()
    return file


def test_a_kernel_is_compiled_once_and_read_after_that(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet"
    first, second = compiled(KernelFolder(path)), compiled(KernelFolder(path))
    assert (was_read(first), was_read(second)) == (False, True)
    assert first(7) == second(7) == 21
    assert the_file(path).stat().st_mode & 0o777 == 0o644


COMPILE = """
import sys, time
from pathlib import Path
from kernels.numba.kernel_cache import KernelFolder, kernel
go = Path(sys.argv[2])
print("here", flush=True)
while not go.exists():
    time.sleep(0.001)
def triple(number):
    return 3 * number
function = kernel("int64(int64)", folder=KernelFolder(Path(sys.argv[1])))(triple)
print(sum(function.stats.cache_hits.values()), function(7))
"""


def test_of_processes_that_share_a_folder_one_compiles_and_the_others_wait(tmp_path: Path) -> None:
    """As replicas on one volume do, which start together."""
    command = [sys.executable, "-c", COMPILE, str(tmp_path / "kernels"), str(tmp_path / "go")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
    (tmp_path / "go").touch()
    assert sorted(process.communicate()[0] for process in processes) == ["0 21\n", "1 21\n", "1 21\n"]


def caller(folder: KernelFolder, called: Callable[[tuple[int]], int]) -> Callable[[int], int]:
    @kernel("int64(int64)", folder=folder)
    def divide(number):
        return called((100,)) // called((number,))

    return divide


def test_a_kernel_that_is_called_by_name_is_found_from_compiled_callers_and_from_read_ones(tmp_path: Path) -> None:
    for has_run_before in (False, True):
        divide = caller(KernelFolder(tmp_path / "caller"), by_name(compiled(KernelFolder(tmp_path / "called"))))
        assert was_read(divide) == has_run_before
        assert divide(7) == 300 // 21
        with pytest.raises(ZeroDivisionError):
            divide(0)


def test_an_exception_comes_through_a_call_by_name(tmp_path: Path) -> None:
    @kernel("int64(int64)", folder=KernelFolder(tmp_path))
    def invert(number):
        return 1000 // number

    divide = caller(KernelFolder(tmp_path), by_name(invert))
    assert divide(50) == 10 // 20
    with pytest.raises(ZeroDivisionError):
        divide(0)


def test_other_signatures_have_other_files(tmp_path: Path) -> None:
    folder = KernelFolder(tmp_path)
    for kind in ("int64", "float64"):
        function = kernel(f"{kind}({kind})", folder=folder)(lambda number: 3 * number)
        assert function(2) == 6
        assert not was_read(function)
    assert len(list(tmp_path.iterdir())) == 2


def damages(content: bytes) -> dict[str, bytes]:
    chance = random.Random(1)
    flipped = {}
    for number in range(20):
        place = chance.randrange(len(content))
        changed = content[place] ^ (1 << chance.randrange(8))
        flipped[f"bit {number}"] = content[:place] + bytes([changed]) + content[place + 1 :]
    cut = {f"cut {number}": content[: chance.randrange(len(content))] for number in range(20)}
    zeros = {"zeros": bytes(len(content)), "zeros at the end": content[: len(content) // 2].ljust(len(content), b"\0")}
    return {**flipped, **cut, **zeros, "empty": b"", "longer": content + b"x", "text": b"not a kernel"}


def test_a_damaged_file_is_made_again_and_the_message_names_its_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(KernelFolder(tmp_path))
    file = the_file(tmp_path)
    whole = file.read_bytes()
    for name, damaged in damages(whole).items():
        file.write_bytes(damaged)
        caplog.clear()
        function = compiled(KernelFolder(tmp_path))
        assert function(7) == 21
        assert not was_read(function), name
        [message] = caplog.messages
        assert f"{tmp_path} are damaged; they are compiled again" in message
        assert was_read(compiled(KernelFolder(tmp_path))), name


@pytest.mark.parametrize("path", ["a file/below it", "/proc/nowhere", "/dev/null/below it"])
def test_where_nothing_can_be_written_kernels_are_compiled_in_memory_with_one_warning(
    tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    folder = KernelFolder(tmp_path / path)
    assert compiled(folder)(7) == compiled(folder)(7) == 21
    [message] = caplog.messages
    assert f"stay in memory, since {tmp_path / path} cannot be written" in message


def test_a_disk_that_gets_full_costs_the_cache_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = KernelFolder(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a write beyond it fails, as on a full disk
    try:
        assert compiled(folder)(7) == 21
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert "File too large" in caplog.text
    assert not was_read(compiled(folder))
    assert was_read(compiled(folder))


def test_no_home_means_memory(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert compiled(KernelFolder(None))(7) == 21
    assert "there is no home directory" in caplog.text


@pytest.mark.parametrize(
    ("environment", "root"),
    [
        ({"NUMBA_CACHE_DIR": "/n", "PEREGRINE_CACHE": "/p"}, "/n"),
        ({"PEREGRINE_CACHE": "/p", "XDG_CACHE_HOME": "/x"}, "/p/kernels"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/peregrine/kernels"),
        ({"HOME": "/h"}, "/h/.cache/peregrine/kernels"),
    ],
)
def test_where_the_cache_lies(environment: dict[str, str], root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NUMBA_CACHE_DIR", "PEREGRINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    directory = cache_directory()
    assert directory is not None
    assert str(directory.parent) == os.path.normpath(root)


_FACTORY = """
import sys
from pathlib import Path
from kernels.numba.kernel_cache import KernelFolder, address_of, kernel, named
def make(factor):
    def multiply(number):
        return factor * number
    return kernel("int64(int64)", folder=KernelFolder(Path(sys.argv[1])))(named(multiply, f"times {factor}"))
functions = [make(int(factor)) for factor in sys.argv[2:]]
print([function(10) for function in functions], len({address_of(function) for function in functions}))
"""


def test_kernels_of_one_source_that_different_processes_compiled_are_told_apart(tmp_path: Path) -> None:
    def run(*factors: str) -> str:
        command = [sys.executable, "-c", _FACTORY, str(tmp_path), *factors]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()

    assert run("2") == "[20] 1"
    assert run("3") == "[30] 1"
    assert run("2", "3") == "[20, 30] 2"
    assert run("3", "2") == "[30, 20] 2"
