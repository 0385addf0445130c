"""FlashAttention-3 as vLLM builds it: one shared library, which is carried along packed."""

from __future__ import annotations

import importlib.util
import lzma
import tempfile
from pathlib import Path

PACKAGE = "carried_peers"
FLASH_LIBRARY = "_vllm_fa3_C.abi3.so"


def unpacked_flash_library() -> Path:
    """Unpacks it, once a machine. FileNotFoundError where it was not carried along."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("FlashAttention-3 was not carried along")
    packed = Path(next(iter(spec.submodule_search_locations))) / f"{FLASH_LIBRARY}.xz"
    unpacked = Path(tempfile.gettempdir()) / FLASH_LIBRARY
    if not unpacked.exists() or unpacked.stat().st_mtime < packed.stat().st_mtime:
        partial = unpacked.with_suffix(".partial")
        partial.write_bytes(lzma.decompress(packed.read_bytes()))
        partial.replace(unpacked)
    return unpacked
