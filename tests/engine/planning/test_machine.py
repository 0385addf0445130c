"""What is read about the machine, and what control groups take away from it."""

from pathlib import Path

import pytest
import torch

from engine.planning.machine import (
    cgroup_cpu_quota,
    cgroup_memory,
    describe_compiled_kernels,
    describe_kernels,
    read_machine,
)
from engine.quantization.method import COMPILED_FORMATS, FORMATS


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_this_machine_is_plausible() -> None:
    machine = read_machine()
    assert 1 <= machine.num_threads <= machine.num_cores
    assert 0 < machine.available_bytes <= machine.total_bytes
    assert machine.cpu_name
    assert (machine.gpu is None) == (machine.device == "cpu") == (not torch.cuda.is_available())


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
    ],
)
def test_a_cpu_quota_is_read_from_both_versions(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cgroup_cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("files", "memory"),
    [
        ({}, None),
        ({"memory.max": "max", "memory.current": "5"}, None),
        ({"memory.max": "1000", "memory.current": "300", "memory.stat": "anon 1\ninactive_file 100"}, (1000, 200)),
        ({"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5"}, None),
        ({"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "300"}, (1000, 300)),
    ],
)
def test_a_memory_limit_is_read_from_both_versions(
    tmp_path: Path, files: dict[str, str], memory: tuple[int, int] | None
) -> None:
    assert cgroup_memory(write(tmp_path, files)) == memory


def test_every_format_says_which_kernel_it_runs() -> None:
    machine = read_machine()
    for dtype in (torch.float32, torch.bfloat16):
        linear = {describe_kernels(machine, dtype=dtype, quantization=name)["linear layers"] for name in FORMATS}
        assert len(linear) == len(FORMATS)


def test_every_compiled_format_says_what_it_keeps() -> None:
    machine = read_machine()
    linear = {describe_compiled_kernels(machine, quantization=name)["linear layers"] for name in COMPILED_FORMATS}
    assert len(linear) == len(COMPILED_FORMATS)
