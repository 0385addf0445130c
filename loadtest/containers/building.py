"""Building the CPU image with buildah, on a base from its registry or, out of its reach, on one made of packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TAG = "localhost/peregrine:image-test"
LOCAL_BASE = "localhost/peregrine-base:made"
PULL_PATIENCE = 60.0  # seconds
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PIP_VARIABLES = {"global.find-links": "PIP_FIND_LINKS", ":env:.find-links": "PIP_FIND_LINKS"} | {
    "global.extra-index-url": "PIP_EXTRA_INDEX_URL",
    "global.index-url": "PIP_INDEX_URL",
}


@dataclass(frozen=True)
class Built:
    """base: what it was built on. num_bytes: of all layers, uncompressed

    seconds: of the build alone, few where its layers were kept from the last
    """

    base: str
    seconds: float
    num_bytes: int


def check_programs(*names: str) -> None:
    """Raises ValueError where one is missing."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed; on Debian and Ubuntu: apt install {' '.join(missing)}")


def command(words: Sequence[str], *, patience: float = 3600.0, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints. Raises RuntimeError, with its last lines, where it fails or takes too long."""
    try:
        result = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
            env={**os.environ, "BUILDAH_ISOLATION": "chroot", **(environment or {})},
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(words[:3])} took longer than {patience:g} s") from error
    if result.returncode:
        tail = (result.stdout + result.stderr)[-3000:]
        raise RuntimeError(f"{' '.join(words[:3])} ended with code {result.returncode}:\n{tail}")
    return result.stdout.strip()


def build(packages: Mapping[str, str]) -> Built:
    """Builds the CPU target. packages: settings of pip for a local base, `pip_settings`."""
    base = official_base()
    try:
        command(["buildah", "pull", "--quiet", base], patience=PULL_PATIENCE)
        argument = base
    except RuntimeError as error:
        print(f"{base} cannot be had ({str(error).splitlines()[-1]}); one is made of packages", file=sys.stderr)
        if not _is_there(LOCAL_BASE):
            make_base(packages)
        argument, base = LOCAL_BASE, "Debian packages (mmdebstrap)"
    begun = time.monotonic()
    words = ["buildah", "build", "--format", "docker", "--layers", "--network", "host", "--target", "cpu"]
    command([*words, "--build-arg", f"CPU_BASE={argument}", "--tag", TAG, *mounts(packages), str(ROOT)])
    seconds = time.monotonic() - begun
    size = command(["podman", "image", "inspect", "--format", "{{.Size}}", TAG])
    return Built(base, round(seconds, 1), int(size))


def _is_there(tag: str) -> bool:
    try:
        command(["podman", "image", "inspect", tag])
    except RuntimeError:
        return False
    return True


def official_base() -> str:
    """The base that the Dockerfile names."""
    found = re.search(r"^ARG CPU_BASE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def make_base(packages: Mapping[str, str]) -> None:
    """An image of Debian's smallest set of packages, with pip's settings and certificates of this machine."""
    check_programs("mmdebstrap")
    with tempfile.TemporaryDirectory(prefix="peregrine-base-") as folder:
        archive = Path(folder) / "root.tar"
        without = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "info", "locale")]
        words = ["mmdebstrap", "--variant=minbase", "--include=ca-certificates", *without]
        command([*words, "bookworm", str(archive)])
        settings = "".join(f'ENV {name}="{value}"\n' for name, value in packages.items())
        (Path(folder) / "Dockerfile").write_text(f"FROM scratch\nADD root.tar /\n{settings}")
        command(["buildah", "build", "--format", "docker", "--tag", LOCAL_BASE, folder])


def pip_settings() -> dict[str, str]:
    """Where this machine's pip finds packages, as environment variables; empty where it has only the defaults."""
    lines = command([sys.executable, "-m", "pip", "config", "list"]).splitlines()
    given = dict(re.findall(r"^(\S+)='(.*)'$", "\n".join(lines), re.MULTILINE))
    settings = {  # pip shows the end of a line as it is written in Python
        variable: " ".join(given[name].replace("\\n", " ").split())
        for name, variable in PIP_VARIABLES.items()
        if name in given
    }
    return {**settings, "PIP_CERT": str(CERTIFICATES)} if settings and CERTIFICATES.exists() else settings


def mounts(packages: Mapping[str, str]) -> list[str]:
    """Options that show the folders of pip's settings, and this machine's certificates, to a container."""
    folders = {word.removeprefix("file://") for value in packages.values() for word in value.split()}
    shown = {_top(Path(folder)) for folder in folders if folder.startswith("/") and Path(folder).is_dir()}
    options = [f"--volume={folder}:{folder}:ro" for folder in sorted(map(str, shown))]
    if packages and CERTIFICATES.exists():
        options.append(f"--volume={CERTIFICATES}:{CERTIFICATES}:ro")
    return options


def _top(folder: Path) -> Path:
    """/opt/pypi for /opt/pypi/simple, whose links lead to its neighbours."""
    return Path(*folder.parts[:3])
