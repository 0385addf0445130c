"""Kernels of a CPU, compiled by Numba when they are first imported, and then kept on disk.

Import `kernels.numba.team` only where they will run: the first import on a machine compiles for fifteen seconds or so.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numba


def _cache_directory() -> Path:
    """A directory for what these very sources compile to: Numba itself looks at one file only to see what is stale.

    Where none can be written, one that lasts as long as the process, so that each start compiles.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    package = Path(__file__).parent
    for source in (*sorted(package.glob("*.py")), package.parent / "panel.py"):
        digest.update(source.read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = root / "peregrine" / "kernels" / digest.hexdigest()[:16]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="peregrine-kernels-"))
    return directory if os.access(directory, os.W_OK) else Path(tempfile.mkdtemp(prefix="peregrine-kernels-"))


if "NUMBA_CACHE_DIR" not in os.environ:
    numba.config.CACHE_DIR = str(_cache_directory())
