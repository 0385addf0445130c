"""Compiles Triton kernels for NVIDIA chips on a machine that has none, through the wrappers that launch them.

Inside `compile_for(90)` a driver that only claims to exist is active, and every launch becomes a compilation for that
chip: the wrappers are called with CPU tensors, so the specialisation is that of a real launch. The machine code is
read with the disassembler that comes with triton.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

assert os.environ.get("TRITON_INTERPRET", "0") != "1", "in the interpreter nothing is compiled"

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = (
    "HGMMA", "UTCHMMA", "HMMA", "IGMMA", "IMMA", "QGMMA", "UTCQMMA", "LDGSTS", "LDL", "STL"
)  # fmt: skip


class AbsentDriver(DriverBase):
    """Claims a chip. Launches go no further than compiling, so nothing else is asked of it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> object:
        raise AssertionError("nothing is tuned when kernels are launched")

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One specialisation of a kernel as the chip would run it. Sizes in bytes."""

    case: str
    kernel: str
    num_warps: int
    registers: int
    stack: int
    local: int
    shared: int
    instructions: dict[str, int]


@contextlib.contextmanager
def compile_for(arch: int, case: str, compiled: list[Compiled]) -> Iterator[None]:
    """Collects what the launches inside compile to."""
    driver, run = triton.runtime.driver, JITFunction.run
    active = driver._active
    seen: set[str] = set()

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool = False, **options: object) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            metadata = kernel.metadata
            facts = read_machine_code(kernel.asm["cubin"])
            compiled.append(Compiled(case, metadata.name, metadata.num_warps, shared=metadata.shared, **facts))
        return kernel

    driver._active, JITFunction.run = AbsentDriver(arch), compile_only
    try:
        yield
    finally:
        driver._active, JITFunction.run = active, run


def read_machine_code(cubin: bytes) -> dict[str, object]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = _output("cuobjdump", "-res-usage", file.name), _output("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9_]*)", listing, re.MULTILINE)
    registers, stack, local = map(int, found.groups())
    counts = {name: names.count(name) for name in INSTRUCTIONS}
    return {"registers": registers, "stack": stack, "local": local, "instructions": counts}


def _output(tool: str, *arguments: str) -> str:
    result = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
