"""Where and when a measurement was made: without it a figure cannot be compared with another."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

FEATURES = {
    "f16c", "fma", "avx", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
}  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """The machine of the client, and of the servers if they run on the same one.

    num_cores: logical; num_physical_cores: 0 where it is unknown
    features: the processor's instruction sets that matter for speed, as Linux names them
    memory: bytes
    """

    date: str
    commit: str
    machine: str
    num_cores: int
    memory: int
    system: str
    python: str
    packages: dict[str, str]
    num_physical_cores: int = 0
    features: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """When, of which commit and where, for captions."""
        cores = f"{self.num_cores} cores" + (f" ({', '.join(self.features)})" if self.features else "")
        return f"{self.date[:10]}, commit {self.commit}, {self.machine}, {cores}"


def read_environment() -> Environment:
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        machine=_processor_line("model name") or platform.processor() or platform.machine(),
        num_cores=psutil.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        system=platform.platform(),
        python=platform.python_version(),
        packages=_versions(),
        num_physical_cores=psutil.cpu_count(logical=False) or 0,
        features=sorted(set(_processor_line("flags", "Features").split()) & FEATURES),
    )


def _commit() -> str:
    """The checkout's commit, `-dirty` behind it if files differ; `unknown` outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()


def _processor_line(*names: str) -> str:
    """What /proc/cpuinfo says of the first processor under one of the names; empty where there is no such line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")


def _versions() -> dict[str, str]:
    """Of what this process runs on, and of what our own server runs on if it is installed beside it."""
    versions = {}
    for name in ("httpx", "httptools", "msgspec", "numpy", "torch", "transformers", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
