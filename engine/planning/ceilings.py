"""Roofline ceilings of this machine, measured at start, and the rates that real steps have reached.

Other programs can only make a machine look slower, so the best of many short measurements counts, and the best of all
starts is kept in the cache directory, by machine and version: a rate never falls.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from engine.loading.default_model import cache_directory
from engine.planning.machine import Ceilings, Machine

logger = logging.getLogger(__name__)

CEILING_SECONDS = 0.06  # spent on each of the two measurements
_PIECE_BYTES = 4 << 20  # per timed read: 0.1 ms, in which a thread is seldom interrupted
_NUM_PIECES_IN_A_STRETCH = 16  # consecutive reads of each thread, of which the best stretch counts
_CACHE_LEVEL_3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_BLOCK_BYTES = (128 << 20, 512 << 20)  # least and most that is read before it is read again
_GPU_REPEATS = 8


@dataclass(frozen=True, slots=True)
class CeilingsFile:
    """The file with the ceilings of one machine. If it cannot be read or written, each start measures anew."""

    path: Path

    def read(self) -> Ceilings:
        try:
            ceilings = msgspec.json.decode(self.path.read_bytes(), type=Ceilings)
        except (OSError, msgspec.DecodeError):
            return Ceilings()
        return ceilings if ceilings.is_sane else Ceilings()

    def add(self, seen: Ceilings) -> Ceilings:
        """Merges ceilings into the file, the higher of each, and returns the result."""
        known = self.read()
        best = known.best_of(seen)
        if best != known:
            self._write(best)
        return best

    def _write(self, ceilings: Ceilings) -> None:
        beside = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(msgspec.json.encode(ceilings))
            beside.replace(self.path)
        except OSError as error:
            logger.info("what was learned of this machine's speed is not kept: %s", error)


def ceilings_file(machine: Machine, device: str) -> CeilingsFile:
    """The file of a machine's CPU or GPU, for these versions of what computes on it."""
    gpu = machine.gpu.name if machine.gpu is not None else ""
    cpu = (machine.cpu_name, machine.num_cores, machine.num_threads)
    parts = [device, *cpu, gpu, torch.__version__, release()]
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
    return CeilingsFile(cache_directory() / "machines" / f"{digest}.json")


def release() -> str:
    """The installed version, or "source" for a checkout that was not installed."""
    try:
        return version("peregrine")
    except PackageNotFoundError:
        return "source"


def with_ceilings(machine: Machine, device: str) -> Machine:
    """The machine with the best ceilings that this start or an earlier one has measured. 0.2 s.

    device: "cpu" or "cuda", where the model will run
    """
    measured = measure_gpu_ceilings() if device == "cuda" else Ceilings(*measure_ceilings(machine.num_threads))
    return replace(machine, ceilings=ceilings_file(machine, device).add(measured))


def measure_ceilings(num_threads: int) -> tuple[float, float]:
    """This CPU's ceilings: bytes per second read from memory, float32 operations per second.

    Without barriers between threads: the arithmetic is that of one thread, times their number, and reads are counted in
    the best stretch of time of all threads.
    """
    num_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix, out = torch.ones(256, 256), torch.empty(256, 256)
        flops_per_second = num_threads * 2 * 256**3 / _fastest(lambda: torch.mm(matrix, matrix, out=out))
        return _read_rate(num_threads), flops_per_second
    finally:
        torch.set_num_threads(num_before)


def measure_gpu_ceilings() -> Ceilings:
    """A GPU's ceilings, of bfloat16 operations; unknown where its memory has no room for the measurement."""
    try:
        block = torch.ones(1 << 26, device="cuda")
        matrix = torch.ones(4096, 4096, dtype=torch.bfloat16, device="cuda")
    except torch.OutOfMemoryError:
        return Ceilings()
    reading = _fastest(lambda: _repeat(block.sum)) / _GPU_REPEATS
    computing = _fastest(lambda: _repeat(lambda: matrix @ matrix)) / _GPU_REPEATS
    return Ceilings(block.nbytes / reading, 2 * 4096**3 / computing)


def _repeat(work: Callable[[], Tensor]) -> None:
    for _ in range(_GPU_REPEATS):
        work()
    torch.cuda.synchronize()


def _fastest(work: Callable[[], object]) -> float:
    """Seconds that `work` takes at best."""
    work()
    best, end = float("inf"), time.perf_counter() + CEILING_SECONDS
    while (start := time.perf_counter()) < end:
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _read_rate(num_threads: int) -> float:
    """Bytes per second, of all threads together, in the best stretch of time."""
    block = torch.ones(_block_bytes() // 4)
    size = _PIECE_BYTES // 4
    pieces = [block[start : start + size] for start in range(0, len(block), size)]
    ends: list[list[float]] = [[] for _ in range(num_threads)]

    def read(thread: int) -> None:
        first = thread * len(pieces) // num_threads
        places = itertools.chain(range(first, len(pieces)), itertools.cycle(range(len(pieces))))
        end = time.perf_counter() + CEILING_SECONDS
        for place in places:
            pieces[place].sum()
            ends[thread].append(time.perf_counter())
            if ends[thread][-1] > end:
                return

    threads = [threading.Thread(target=read, args=(thread,)) for thread in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(best_rate(sorted(itertools.chain(*ends)), num_threads), max(best_rate(one, 1) for one in ends))


def best_rate(ends: list[float], num_threads: int) -> float:
    """Bytes per second in the best stretch of pieces, given when each was read. 0 where there are too few."""
    size = _NUM_PIECES_IN_A_STRETCH * num_threads
    stretches = [ends[i + size] - ends[i] for i in range(len(ends) - size)]
    return size * _PIECE_BYTES / min(stretches) if stretches and min(stretches) > 0 else 0.0


def _block_bytes() -> int:
    """The size of the memory that is read, in bytes: several times the last-level cache."""
    least, most = _BLOCK_BYTES
    try:
        cached = int(_CACHE_LEVEL_3.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        cached = 0
    return min(max(least, 4 * cached), most)
