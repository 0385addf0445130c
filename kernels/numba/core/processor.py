"""The processor that kernels are compiled for: which vector instructions they use, and which tiles fit its registers.

Numba compiles for the features in NUMBA_CPU_FEATURES, or for all that the processor has; so does everything here.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from typing import NamedTuple

import llvmlite.binding as llvm
from numba.core import config


class TileRows(NamedTuple):
    """The most rows of a tile of two panels of 16 columns, and of one."""

    two_panels: int
    one_panel: int


class Level(NamedTuple):
    """A set of vector instructions, and what kernels make of it. Those of x86 include the levels before them.

    features: by LLVM's names. A tile has a register (two of AVX2, four of NEON) for each row and panel, and a few for
    operands: integers need more of them, and their tiles have a second sum, of floats, for each row and panel.
    """

    name: str
    features: frozenset[str]
    floats: TileRows = TileRows(12, 12)
    integers: TileRows = TileRows(6, 6)


_X86 = (
    Level("avx2", frozenset({"avx2", "fma", "f16c"}), TileRows(2, 6), TileRows(2, 4)),
    Level("avx512", frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})),
    Level("avx512-vnni", frozenset({"avx512vnni"})),
    Level("avx512-bf16", frozenset({"avx512bf16"})),
)
_OTHER = Level("generic", frozenset(), TileRows(2, 6), TileRows(2, 4))  # NEON's registers are a quarter of a vector
LINE = 64  # bytes of a cache line; counters that share one slow each other down (false sharing)
LEVELS = tuple(level.name for level in _X86)
TILES_MODULE = "kernels.numba.core.tiles"  # whose shapes are those of the level at the time when it is imported


@lru_cache(maxsize=1)
def features() -> frozenset[str]:
    """LLVM's names of what kernels are compiled for."""
    wanted = config.CPU_FEATURES
    if wanted is None:
        return frozenset(name for name, is_there in llvm.get_host_cpu_features().items() if is_there)
    return frozenset(part[1:] for part in wanted.split(",") if part.startswith("+"))


@lru_cache(maxsize=1)
def level() -> Level:
    """The highest level whose features are all there.

    PEREGRINE_TILES names another one, for tests: any processor computes the tiles of every level, with the instructions
    that it has.
    """
    asked = os.environ.get("PEREGRINE_TILES")
    return level_of(features()) if asked is None else next(one for one in _X86 if one.name == asked)


def level_of(found: frozenset[str]) -> Level:
    best = _OTHER
    for one in _X86:
        if not one.features <= found:
            break
        best = one
    return best


def limit_to(name: str) -> None:
    """Makes Numba compile for the level of this name and no higher, in this process and in those that it starts.

    ValueError where the processor does not reach that level, or kernels are there that were compiled for another.
    """
    host = [feature for feature, is_there in llvm.get_host_cpu_features().items() if is_there]
    reached = level_of(frozenset(host)).name
    if reached not in LEVELS or LEVELS.index(name) > LEVELS.index(reached):
        raise ValueError(f"this processor's vector instructions are {reached}")
    if TILES_MODULE in sys.modules and level().name != name:
        raise ValueError(f"kernels were compiled for {level().name} already in this process")
    higher = frozenset().union(*(one.features for one in _X86[LEVELS.index(name) + 1 :]))
    prefixes = ("amx", "avx10", *(["avx512", "avxvnni"] if name == "avx2" else []))
    signs = {one: "-" if one in higher or one.startswith(prefixes) else "+" for one in host}
    os.environ["NUMBA_CPU_FEATURES"] = ",".join(f"{sign}{feature}" for feature, sign in signs.items())
    os.environ["NUMBA_CPU_NAME"] = llvm.get_host_cpu_name()
    config.reload_config()
    features.cache_clear()
    level.cache_clear()
