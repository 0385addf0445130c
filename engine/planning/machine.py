"""The hardware of this machine: cores, instructions, memory, GPU; and the kernels that run on it, in words."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from engine.quantization.method import COMPILED_FORMATS, can_pack, has_fast_bf16, has_float16_weights

CGROUP = Path("/sys/fs/cgroup")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_UNLIMITED = 1 << 60  # cgroup version 1 writes a number near 2**63 where there is no limit


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The highest measured rates of one machine; 0 where unknown."""

    bytes_per_second: float = 0.0  # read from memory
    flops_per_second: float = 0.0  # of matrix products
    step_flops_per_second: Mapping[str, float] = field(default_factory=dict)  # of real steps, by model and kernels

    def best_of(self, other: Ceilings) -> Ceilings:
        ours, theirs = self.step_flops_per_second, other.step_flops_per_second
        return Ceilings(
            max(self.bytes_per_second, other.bytes_per_second),
            max(self.flops_per_second, other.flops_per_second),
            {key: max(ours.get(key, 0.0), theirs.get(key, 0.0)) for key in [*ours, *theirs]},
        )

    @property
    def is_sane(self) -> bool:
        rates = (self.bytes_per_second, self.flops_per_second, *self.step_flops_per_second.values())
        return all(0.0 <= rate < 1e18 for rate in rates)


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    total_bytes: int
    available_bytes: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts, read once at start. Bytes are of the memory that the model will live in: the GPU's where there is one."""

    device: str  # "cuda" or "cpu"
    cpu_name: str
    num_cores: int  # physical cores
    num_threads: int  # physical cores that this process may use: affinity and cgroup quota counted
    total_bytes: int
    available_bytes: int
    has_fast_bf16: bool  # the CPU multiplies bfloat16
    has_avx512: bool
    has_float16_weights: bool  # FBGEMM multiplies float32 by float16 weights
    gpu: Gpu | None = None
    process_bytes: int = 0  # that this process takes already
    ceilings: Ceilings = Ceilings()  # nothing, until `engine.planning.ceilings.with_ceilings` has measured


def read_machine() -> Machine:
    """Reads the machine. Takes milliseconds where there is no GPU."""
    gpu = _read_gpu()
    total, available = _read_memory() if gpu is None else (gpu.total_bytes, gpu.available_bytes)
    num_cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return Machine(
        device="cpu" if gpu is None else "cuda",
        cpu_name=_read_cpu_name(),
        num_cores=num_cores,
        num_threads=_num_usable_threads(num_cores),
        total_bytes=total,
        available_bytes=available,
        has_fast_bf16=has_fast_bf16(),
        has_avx512="AVX512" in torch.backends.cpu.get_cpu_capability(),
        has_float16_weights=has_float16_weights(),
        gpu=gpu,
        process_bytes=psutil.Process().memory_info().rss,
    )


@contextmanager
def freeing_at_once() -> Iterator[None]:
    """A context in which glibc returns freed memory to the system at once, for loading and packing a model.

    Otherwise it would keep hundreds of megabytes for later. Afterwards allocations of up to 32 MiB are kept again, the
    most that glibc itself allows (mallopt(3), M_MMAP_THRESHOLD), since activations are allocated in every step.
    """
    libc = ctypes.CDLL(None)
    set_threshold = getattr(libc, "mallopt", lambda option, value: 0)
    set_threshold(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        set_threshold(_MMAP_THRESHOLD, 32 << 20)
        set_threshold(_TRIM_THRESHOLD, 64 << 20)


def describe_kernels(machine: Machine, *, dtype: torch.dtype, quantization: str) -> dict[str, str]:
    """Which kernel each part of a model in `dtype` runs on this machine's CPU, in words, for `peregrine doctor`."""
    return {
        "linear layers": _describe_linear(dtype, quantization),
        "attention, decoding": f"batched matrix products over gathered blocks, {_name(dtype)}",
        "attention, prompts": "torch's fused scaled_dot_product_attention; matrix products where scores are capped",
        "everything else": f"torch, vectorised for {torch.backends.cpu.get_cpu_capability()}",
        "threads": f"{machine.num_threads} of {machine.num_cores} cores",
    }


def describe_compiled_kernels(machine: Machine, *, quantization: str) -> dict[str, str]:
    """As `describe_kernels`, for `device.kernels: numba`, where one program computes all layers of a step."""
    program = "in the same program, float32"
    return {
        "linear layers": f"compiled; weights as {COMPILED_FORMATS[quantization].meaning}",
        "attention": f"over the cache's blocks where they lie, {program}",
        "norms and activation": program,
        "other models": "torch: the plan of a model that is not of Llama's kind says why",
        "threads": f"{machine.num_threads} of {machine.num_cores} cores, which take units of work from one counter",
    }


def _describe_linear(dtype: torch.dtype, quantization: str) -> str:
    if quantization == "fp16":
        available = "" if has_float16_weights() else " (not available in this torch build)"
        return f"FBGEMM: float16 weights, float32 activations{available}"
    if quantization == "int8":
        if dtype == torch.bfloat16 and has_fast_bf16():
            return "int8 weights: torch's int8 kernel for a few rows, dequantised into oneDNN products above"
        return f"int8 weights, dequantised piece by piece into {_name(dtype)} products"
    if dtype == torch.float32:
        return "torch's float32 product; oneDNN-packed weights for large matrices"
    if can_pack(dtype):
        return f"oneDNN-packed {_name(dtype)} weights"
    return f"torch's {_name(dtype)} product, which this CPU emulates: slow; prefer model.dtype float32"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_gpu() -> Gpu | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    available, total = torch.cuda.mem_get_info(0)
    return Gpu(properties.name, total, available, (properties.major, properties.minor))


def _read_cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _num_usable_threads(num_cores: int) -> int:
    """Physical cores within affinity and quota. Not logical ones, since the two of a core share its multipliers."""
    usable = float(num_cores)
    if hasattr(os, "sched_getaffinity"):
        num_logical = os.cpu_count() or num_cores
        usable = min(usable, max(1.0, len(os.sched_getaffinity(0)) * num_cores / num_logical))
    quota = cgroup_cpu_quota(CGROUP)
    return max(1, int(usable if quota is None else min(usable, quota)))


def _read_memory() -> tuple[int, int]:
    """Total and available bytes: of the cgroup where it has a limit below the machine's."""
    memory = psutil.virtual_memory()
    limit = cgroup_memory(CGROUP)
    if limit is None or limit[0] >= memory.total:
        return memory.total, memory.available
    return limit[0], min(memory.available, max(0, limit[0] - limit[1]))


def cgroup_cpu_quota(root: Path) -> float | None:
    """Cores that the control group mounted at `root` may use, version 2 or 1; None without a limit."""
    fields = (_read(root / "cpu.max") or "").split()  # "max 100000" or "150000 100000"
    if len(fields) != 2:
        fields = [_read(root / "cpu" / name) or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    quota, period = fields
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:  # "max" and -1 mean no limit
        return None
    return int(quota) / int(period)


def cgroup_memory(root: Path) -> tuple[int, int] | None:
    """(limit, used) in bytes of the control group mounted at `root`, version 2 or 1; None without a limit.

    Page cache that can be dropped does not count as used.
    """
    for limit_file, used_file, stat_file, cache_key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        limit, used = _read(root / limit_file), _read(root / used_file)
        if limit is None or used is None or not limit.isdigit() or not used.isdigit() or int(limit) > _UNLIMITED:
            continue
        stat = dict(line.split(maxsplit=1) for line in (_read(root / stat_file) or "").splitlines())
        return int(limit), max(0, int(used) - int(stat.get(cache_key, 0)))
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
