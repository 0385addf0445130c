"""Collects what a GPU machine without a network lacks: it has torch, triton and transformers, and nothing of ours.

A wheel for each package that the project needs at run time and those three do not bring, in the versions of
constraints.txt, for Python 3.12 on x86-64 Linux; and peers that attention and quantised products are compared with.
"""

from __future__ import annotations

import base64
import hashlib
import lzma
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

PACKAGE = "carried_peers"
FLASH_LIBRARY = "_vllm_fa3_C.abi3.so"

ROOT = Path(__file__).resolve().parents[2]
_PRESENT = {"torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy"}
_TABLES = {"tabulate"}  # of the extra `loadtest`; nothing is drawn there
_PEERS = {"gemlite"}
_CPU_ONLY = ("numba", "llvmlite")
_VLLM = "vllm==0.24.0"  # the release whose FlashAttention-3 is built for torch 2.11 and CUDA 13
_PYTHON = "3.12"
_PLATFORMS = [f"manylinux_2_{number}_x86_64" for number in (28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]


def collect(folder: Path, *, with_flash: bool, with_cpu: bool) -> int:
    """0, or 1 where something could not be had; the rest is there all the same."""
    folder.mkdir(parents=True, exist_ok=True)
    pins = read_pins(ROOT / "constraints.txt")
    names = sorted(needed_packages() | _TABLES | _PEERS | (set(_CPU_ONLY) if with_cpu else set()))
    missing = [name for name in names if not _download(f"{name}=={pins[name]}" if name in pins else name, folder)]
    if with_flash and not _extract_flash(folder):
        missing.append(f"FlashAttention-3 out of {_VLLM}")
    print(_usage(folder))
    if missing:
        print(f"could not be had: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def read_pins(path: Path) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return {_normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def needed_packages() -> set[str]:
    """What the project needs to run, as installed here, less what is there and what only that needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    waiting = {_normal(_name_in(requirement)) for requirement in project["dependencies"]} - _PRESENT
    while waiting:
        name = waiting.pop()
        found.add(name)
        try:
            needs = requires(name) or []
        except PackageNotFoundError:  # needed elsewhere: by another system or Python
            found.remove(name)
            continue
        waiting |= {_normal(_name_in(need)) for need in needs if "extra ==" not in need} - found - _PRESENT
    return found - set(_CPU_ONLY)


def _name_in(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None, requirement
    return match.group()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _download(requirement: str, folder: Path) -> bool:
    platforms = [part for platform in _PLATFORMS for part in ("--platform", platform)]
    command = ["download", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--dest", str(folder)]
    return _pip([*command, "--python-version", _PYTHON, *platforms, requirement])


def _pip(arguments: list[str]) -> bool:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--no-input"]
    return subprocess.run(command).returncode == 0


def _extract_flash(folder: Path) -> bool:
    """One library out of a large wheel, packed tightly, in a wheel of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        if not _download(_VLLM, Path(scratch)):
            return False
        (large,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(large) as wheel:
            library = wheel.read(f"vllm/vllm_flash_attn/{FLASH_LIBRARY}")
    write_flash_wheel(lzma.compress(library, preset=6), folder, version=_VLLM.partition("==")[2])
    return True


def write_flash_wheel(packed: bytes, folder: Path, *, version: str) -> Path:
    """A wheel with nothing but the packed library (PEP 427)."""
    info = f"{PACKAGE}-{version}.dist-info"
    files = {
        f"{PACKAGE}/__init__.py": b"",
        f"{PACKAGE}/{FLASH_LIBRARY}.xz": packed,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: peregrine\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},{_digest(content)},{len(content)}\n" for name, content in files.items())
    path = folder / f"{PACKAGE}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


def _digest(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _usage(folder: Path) -> str:
    wheels = sorted(folder.glob("*.whl"))
    lines = [f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}" for path in wheels]
    total = sum(path.stat().st_size for path in wheels)
    return "\n".join(
        [
            *lines,
            f"{total / 1e6:8.2f} MB  in {len(wheels)} wheels",
            "",
            "On the GPU machine, in the checkout:",
            f"  python3 -m pip install --no-index --no-deps --no-compile --target {folder}/site {folder}/*.whl",
            f"  PYTHONPATH={folder}/site python3 -m loadtest.gpu",
        ]
    )
