"""The crash report: written when the server gives up on the engine, with sizes and reasons, never contents."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import tempfile
import time
from pathlib import Path

import msgspec

from engine.client.deaths import Death
from engine.ipc.state_directory import state_directory

logger = logging.getLogger(__name__)

REPORTED_PACKAGES = ("peregrine", "torch", "transformers", "triton", "numpy", "msgspec")


class CrashReport(msgspec.Struct, frozen=True, kw_only=True):
    written_at: str
    reason: str
    architecture: str | None
    fingerprint: str | None
    versions: dict[str, str]
    deaths: list[Death]


def installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_crash_report(report: CrashReport) -> Path | None:
    """Writes the report, readable by its owner alone, and returns its path. None if no directory can be written."""
    prefix = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-"
    content = msgspec.json.format(msgspec.json.encode(report), indent=2)
    for find_directory in (state_directory, lambda: Path(tempfile.gettempdir())):
        try:
            directory = find_directory()
            directory.mkdir(parents=True, exist_ok=True)
            fd, path = tempfile.mkstemp(prefix=prefix, suffix=".json", dir=directory)
            with os.fdopen(fd, "wb") as file:
                file.write(content + b"\n")
        except OSError as error:
            logger.warning("cannot write a crash report: %s", error)
            continue
        return Path(path)
    return None
