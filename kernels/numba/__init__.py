"""Kernels of a CPU, compiled by Numba when they are first imported, and then kept on disk.

Import `kernels.numba.team` only where they will run: the first import on a machine compiles for ten seconds or so.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numba


def _cache_directory() -> Path:
    """A directory for what these very sources compile to: Numba itself looks at one file only to see what is stale."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "peregrine" / "kernels" / digest.hexdigest()[:16]


if "NUMBA_CACHE_DIR" not in os.environ:
    numba.config.CACHE_DIR = str(_cache_directory())
