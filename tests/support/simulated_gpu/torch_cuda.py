"""torch.cuda of the simulated device: events, streams, properties, and everything else that is asked for by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.interpreter import InterpretedFunction

from engine.planning import ceilings
from engine.planning.machine import Ceilings
from tests.support.simulated_gpu.device import DeviceGenerator, GraphPool, SimulatedGpu, SimulatedGraph
from tests.support.simulated_gpu.torch_functions import DeviceFunctions

_HostGenerator = torch.Generator


class _Event:
    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu, self._number = gpu, 0

    def record(self, stream: object = None) -> None:
        self._number = self._gpu.num_queued

    def synchronize(self) -> None:
        self._gpu.wait_for(self._number)

    def elapsed_time(self, end: object) -> float:
        return 1.0  # ms


class _Stream:
    def wait_stream(self, other: object) -> None:
        pass


class _Streams:
    """Which stream is current: of what torch.cuda has."""

    def __init__(self) -> None:
        self.current = _Stream()

    def set(self, stream: _Stream) -> None:
        self.current = stream

    @contextmanager
    def use(self, stream: _Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def capture(
        self, graph: SimulatedGraph, pool: GraphPool | None = None, stream: _Stream | None = None
    ) -> Iterator[None]:
        """As torch.cuda.graph: after invalid work it raises when the capture ends, and leaves its stream current."""
        before, self.current = self.current, stream or _Stream()
        graph.begin(pool)
        try:
            yield
        except BaseException:
            graph.end(is_valid=False)
            raise
        graph.end(is_valid=True)
        self.current = before


@contextmanager
def simulated_gpu(total_bytes: int = 1 << 30, capability: tuple[int, int] = (9, 0)) -> Iterator[SimulatedGpu]:
    """Within this context, torch has a GPU in this thread."""
    gpu, streams = SimulatedGpu(total_bytes), _Streams()
    properties = SimpleNamespace(
        name="Simulated GPU", major=capability[0], minor=capability[1], multi_processor_count=4, L2_cache_size=1 << 20
    )
    interpret = InterpretedFunction.run

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        gpu.launch(lambda *bare, **named: interpret(kernel, *bare, **named), args, kwargs)

    def make_generator(device: torch.device | str = "cpu") -> torch.Generator:
        return DeviceGenerator() if torch.device(device).type == "cuda" else _HostGenerator()

    replaced = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "mem_get_info": lambda device=None: (gpu.total_bytes - gpu.used_bytes, gpu.total_bytes),
        "memory_allocated": lambda device=None: gpu.used_bytes,
        "max_memory_allocated": lambda device=None: gpu.peak_bytes,
        "reset_peak_memory_stats": lambda device=None: setattr(gpu, "peak_bytes", gpu.used_bytes),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.wait(),
        "Event": lambda enable_timing=False: _Event(gpu),
        "Stream": _Stream,
        "current_stream": lambda device=None: streams.current,
        "set_stream": streams.set,
        "stream": streams.use,
        "CUDAGraph": lambda: SimulatedGraph(gpu),
        "graph": streams.capture,
        "graph_pool_handle": GraphPool,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch, "Generator", make_generator))
        # the processor's own speed, in bfloat16 for minutes where it has no instructions for it, tells nothing of a GPU
        stack.enter_context(patch.object(ceilings, "measure_gpu_ceilings", Ceilings))
        stack.enter_context(patch.object(InterpretedFunction, "run", launch))
        stack.enter_context(DeviceFunctions(gpu))
        yield gpu
