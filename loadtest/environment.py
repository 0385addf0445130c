"""Where and when a measurement was made: without it a figure cannot be compared with another."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import httpx
import msgspec
import psutil


@dataclass(frozen=True)
class Environment:
    """The machine of the client, and of the servers if they run on the same one. memory: bytes"""

    date: str
    commit: str
    machine: str
    num_cores: int
    memory: int
    system: str
    python: str
    packages: dict[str, str]


def read_environment() -> Environment:
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        machine=_processor(),
        num_cores=psutil.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        system=platform.platform(),
        python=platform.python_version(),
        packages={name: version(name) for name in ("httpx", "httptools", "msgspec", "numpy")},
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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def first_model(http: httpx.AsyncClient) -> str:
    """The model that GET /v1/models names first. Raises ValueError if the server has no such list."""
    try:
        response = await http.get("/v1/models", timeout=30.0)
        models = msgspec.json.decode(response.content, type=_Models).data
    except httpx.TransportError as error:
        raise ValueError(f"{http.base_url}: {error}; is the server up?") from error
    except msgspec.DecodeError as error:
        status = response.status_code
        raise ValueError(f"{http.base_url}: no usable list of models (status {status}); name the model") from error
    if not models:
        raise ValueError(f"{http.base_url} lists no models; name the model")
    return models[0].id


class _Version(msgspec.Struct):
    version: str | None = None
    build_info: str | None = None


async def server_version(http: httpx.AsyncClient) -> str | None:
    """What GET /version says, or the build in GET /props (llama-server); None where neither is known."""
    for path in ("/version", "/props"):
        try:
            response = await http.get(path, timeout=30.0)
            answer = msgspec.json.decode(response.content, type=_Version)
        except (httpx.TransportError, msgspec.DecodeError):
            continue
        if response.status_code == 200 and (answer.version or answer.build_info):
            return answer.version or answer.build_info
    return None
