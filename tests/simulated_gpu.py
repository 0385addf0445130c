"""A GPU that is not there: torch.cuda on top of the CPU, so that what only runs on a GPU runs in a test.

Its tensors say that they are on "cuda" and keep their numbers in a CPU tensor that nobody else can reach. It is as
strict as a real one where a program's mistakes would show only there:

* an operation on tensors of both devices fails, and so does a kernel that is launched with a tensor of the host;
* a copy that is only queued has not happened yet: what it writes on the host is wrong until an event after it, or the
  device, was waited for, and the host memory that it reads must stay as it is until then;
* a graph captures operations, and repeats them on the memory that they used then. While it is captured, nothing may
  wait for the device or copy from the host. What a graph returns is wrong until it is replayed, and again as soon as
  another graph of its pool is;
* memory is counted, and runs out.

Time and order are not simulated: all work is done at once, on one stream, and what a graph allocates is not counted.
Triton's kernels run in its interpreter. Tests read this file with runpy: they import no tests.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

DEVICE = torch.device("cuda", 0)
_WHERE = {"device": DEVICE, "is_cuda": True, "is_cpu": False, "get_device": 0}
_DESCRIPTIONS = {  # what asks nothing of the device
    "shape", "dtype", "ndim", "layout", "size", "stride", "dim", "numel", "nelement", "__len__", "is_contiguous",
    "storage_offset", "data_ptr", "element_size", "itemsize", "nbytes", "requires_grad", "requires_grad_", "grad",
    "grad_fn", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_leaf", "__hash__", "_version",
}  # fmt: skip
_WAITS = {  # what needs the numbers, or their number, on the host
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__repr__", "__format__",
    "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select",
}  # fmt: skip
_INDEXING = {"__getitem__", "__setitem__", "index_put_"}  # may be told by a tensor of the host which rows
_STRICT = {"cat", "stack", "index_select", "embedding", "linear", "matmul", "mm"}  # take not even a number of the host


class Allocation:
    """Device memory that tensors share; gone with the last of them."""

    def __init__(self, gpu: SimulatedGpu, num_bytes: int) -> None:
        gpu.allocate(num_bytes)
        weakref.finalize(self, gpu.free, num_bytes).atexit = False


class DeviceTensor(Tensor):
    """A tensor on the simulated GPU. memory: where its numbers are"""

    memory: Tensor
    allocation: Allocation

    @staticmethod
    def __new__(cls, memory: Tensor, allocation: Allocation) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=DEVICE,
        )
        made.memory, made.allocation = memory, allocation
        return made

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        raise NotImplementedError(f"{func} reached a simulated tensor by a way that is not simulated")


class DeviceGenerator(torch.Generator):
    device = DEVICE


@dataclass(frozen=True)
class _Copy:
    """A queued copy between the device and pinned memory. content: what the host's memory has to hold when it is over;
    number: how many things were queued before it, and itself"""

    number: int
    host: Tensor
    content: Tensor
    is_to_host: bool

    def finish(self) -> None:
        if self.is_to_host:
            self.host.copy_(self.content)
        else:
            assert _has_same_bits(self.host, self.content), "host memory was changed while the device still read it"


@dataclass
class _Operation:
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]

    def repeat(self) -> None:
        for kept, new in zip(self.outputs, _tensors(self.func(*self.args, **self.kwargs)), strict=True):
            if (_address(kept), kept.storage_offset()) != (_address(new), new.storage_offset()):
                kept.copy_(new)


@dataclass
class _Capture:
    """outputs: memory that was allocated within; known: addresses of memory that was used"""

    operations: list[_Operation] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    known: set[int] = field(default_factory=set)

    def add(self, operation: _Operation) -> None:
        self.operations.append(operation)
        self.known |= {_address(tensor) for tensor in _tensors((operation.args, operation.kwargs))}
        self.outputs += [tensor for tensor in operation.outputs if _address(tensor) not in self.known]
        self.known |= {_address(tensor) for tensor in operation.outputs}


class SimulatedGpu:
    """Counts the times that the host waited for all that was queued (not for an event), launches, graphs and replays.

    total_bytes: of its memory; may be changed
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.num_waits = self.num_launches = self.num_graphs = self.num_replays = 0
        self.used_bytes = self.peak_bytes = self.num_queued = 0
        self.capture: _Capture | None = None
        self._copies: list[_Copy] = []
        self._pinned: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self._allocations: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()

    def allocate(self, num_bytes: int) -> None:
        if self.used_bytes + num_bytes > self.total_bytes:
            sizes = f"{num_bytes} bytes, {self.used_bytes} of {self.total_bytes} are in use"
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {sizes}")
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def free(self, num_bytes: int) -> None:
        self.used_bytes -= num_bytes

    def wrap(self, memory: Tensor) -> DeviceTensor:
        """The memory as a tensor of the device."""
        address = _address(memory)
        allocation = self._allocations.get(address)
        if allocation is None:
            allocation = Allocation(self, memory.untyped_storage().nbytes())
            if address:
                self._allocations[address] = allocation
        return DeviceTensor(memory, allocation)

    def pin(self, memory: Tensor) -> Tensor:
        memory.is_simulated_pinned = True
        self._pinned[_address(memory)] = memory.untyped_storage()
        return memory

    def is_pinned(self, memory: Tensor) -> bool:
        return _address(memory) in self._pinned

    def wait(self) -> None:
        """For all that was queued."""
        self.num_waits += 1
        self.wait_for(self.num_queued)

    def wait_for(self, number: int) -> None:
        """For the first `number` of all things that were ever queued."""
        if self.capture is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        for copy in self._copies:
            if copy.number <= number:
                copy.finish()
        self._copies = [copy for copy in self._copies if copy.number > number]

    def upload(self, target: DeviceTensor, source: Tensor, *, is_queued: bool) -> None:
        if self.capture is not None:
            raise RuntimeError("a copy from the host while a graph is captured")
        if is_queued and self.is_pinned(source):
            self.num_queued += 1
            self._copies.append(_Copy(self.num_queued, source, source.clone(), is_to_host=False))
        else:
            self.wait()
        target.memory.copy_(source)

    def download(self, target: Tensor, source: DeviceTensor, *, is_queued: bool) -> None:
        if self.capture is not None:
            raise RuntimeError("a copy to the host while a graph is captured")
        if is_queued and self.is_pinned(target):
            self.num_queued += 1
            self._copies.append(_Copy(self.num_queued, target, source.memory.to(target.dtype, copy=True), True))
            _spoil(target)
        else:
            self.wait()
            target.copy_(source.memory)

    def compute(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operation on the memory of its arguments. Returns its outputs, on the device."""
        wrappers = {id(leaf.memory): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeviceTensor)}
        bare_args, bare_kwargs = tree_map(_memory_of, (args, kwargs))
        result = func(*bare_args, **bare_kwargs)
        self._queue(_Operation(func, bare_args, bare_kwargs, _tensors(result)))

        def on_device(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return wrappers[id(leaf)] if id(leaf) in wrappers else self.wrap(leaf)

        return tree_map(on_device, result)

    def launch(self, kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(not isinstance(tensor, DeviceTensor) for tensor in _tensors((args, kwargs))):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        self.num_launches += 1
        bare_args, bare_kwargs = tree_map(_memory_of, (args, kwargs))
        kernel(*bare_args, **bare_kwargs)
        self._queue(_Operation(kernel, bare_args, bare_kwargs, []))

    def _queue(self, operation: _Operation) -> None:
        self.num_queued += 1
        if self.capture is not None:
            self.capture.add(operation)


class GraphPool:
    """What torch.cuda.graph_pool_handle gives: memory that graphs share."""

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[SimulatedGraph] = weakref.WeakSet()


class SimulatedGraph:
    """torch.cuda.CUDAGraph"""

    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu = gpu
        self._captured: _Capture | None = None
        self._pool = GraphPool()

    def begin(self, pool: GraphPool | None) -> None:
        assert self._gpu.capture is None, "two captures at once"
        self._pool = pool or self._pool
        self._gpu.capture = _Capture()

    def end(self, *, is_valid: bool) -> None:
        self._captured, self._gpu.capture = self._gpu.capture, None
        if not is_valid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self._pool.graphs.add(self)
        self._gpu.num_graphs += 1
        self.spoil()

    def spoil(self) -> None:
        assert self._captured is not None
        for output in self._captured.outputs:
            _spoil(output)

    def replay(self) -> None:
        assert self._captured is not None, "nothing was captured"
        assert self._gpu.capture is None, "a replay while another graph is captured"
        self._gpu.num_replays += 1
        for other in self._pool.graphs:
            if other is not self:
                other.spoil()
        for operation in self._captured.operations:
            operation.repeat()


class _Functions(TorchFunctionMode):
    """Sees every function of torch that a program calls."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_property = getattr(func, "__name__", "") in ("__get__", "__set__")
        name = (resolve_name(func) or "").split(".")[-2] if is_property else getattr(func, "__name__", "")
        is_on_device = any(isinstance(leaf, DeviceTensor) for leaf in tree_leaves((args, kwargs)))
        if name in ("to", "cuda", "cpu"):
            return self._move(name, *args, **kwargs)
        if name == "copy_":
            return self._copy(*args, **kwargs)
        if name == "pin_memory":
            assert not is_on_device, "only memory of the host is pinned"
            return self._gpu.pin(args[0].clone())
        if name == "is_pinned":
            return not is_on_device and self._gpu.is_pinned(args[0])
        if is_on_device:
            return self._on_device(func, name, args, kwargs)
        return self._on_host(func, args, kwargs)

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A function of no tensor, or of the host's: it may make one on the device."""
        device = torch.device(kwargs.get("device") or "cpu")
        is_pinned = kwargs.pop("pin_memory", False)
        _check_generator(kwargs, device)
        if device.type != "cuda":
            made = func(*args, **kwargs)
            return self._gpu.pin(made) if is_pinned else made
        assert not is_pinned, "only memory of the host is pinned"
        kwargs = {**kwargs, "device": "cpu"}
        if func is torch.tensor or func is torch.as_tensor or _tensors((args, kwargs)):
            self._gpu.wait()  # the numbers come from memory that is not pinned
        return self._gpu.compute(func, args, kwargs)

    def _on_device(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name in _WHERE:
            return _WHERE[name]
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if name == "data" and func.__name__ == "__set__":
            args[0].memory, args[0].allocation = args[1].memory, args[1].allocation
            return None
        bare_args, bare_kwargs = tree_map(_memory_of, (args, kwargs))
        if name in _DESCRIPTIONS:
            result = func(*bare_args, **bare_kwargs)
            return args[0] if result is args[0].memory else result
        if name in _WAITS:
            self._gpu.wait()
            result = func(*bare_args, **bare_kwargs)
            return tree_map(lambda leaf: self._gpu.wrap(leaf) if isinstance(leaf, Tensor) else leaf, result)
        device = torch.device(kwargs.get("device") or DEVICE)
        _check_generator(kwargs, device)
        self._check_places(func, name, args, kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        return self._gpu.compute(func, args, kwargs) if device.type == "cuda" else func(*bare_args, **kwargs)

    def _check_places(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        hosts = [tensor for tensor in _tensors((args, kwargs)) if not isinstance(tensor, DeviceTensor)]
        if name in _INDEXING:
            assert isinstance(args[0], DeviceTensor), "a tensor of the host is indexed by one of the device"
            if hosts or any(tensor.dtype is torch.bool for tensor in _tensors(args[1])):
                self._gpu.wait()
        elif any(host.dim() > 0 or name in _STRICT for host in hosts):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({resolve_name(func) or name})"
            )

    def _move(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tensor.to, .cuda and .cpu"""
        device = {"cuda": DEVICE, "cpu": torch.device("cpu")}.get(name, kwargs.get("device"))
        dtype = kwargs.get("dtype")
        for argument in args:
            if isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, Tensor):
                device, dtype = argument.device, argument.dtype
            elif isinstance(argument, (str, torch.device)):
                device = argument
        device, dtype = torch.device(device or tensor.device), dtype or tensor.dtype
        if isinstance(tensor, DeviceTensor):
            if dtype != tensor.dtype:
                tensor = self._gpu.compute(Tensor.to, (tensor, dtype), {})
            if device.type == "cuda":
                return tensor
            landing = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype)
            self._gpu.download(landing, tensor, is_queued=False)
            return landing
        converted = tensor if dtype == tensor.dtype else tensor.to(dtype)
        if device.type != "cuda":
            return converted.clone() if kwargs.get("copy") and converted is tensor else converted
        moved = self._gpu.wrap(torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype))
        self._gpu.upload(moved, converted, is_queued=kwargs.get("non_blocking", False))
        return moved

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
            self._gpu.compute(Tensor.copy_, (target, source), {})
        elif isinstance(target, DeviceTensor):
            self._gpu.upload(target, source, is_queued=non_blocking)
        elif isinstance(source, DeviceTensor):
            self._gpu.download(target, source, is_queued=non_blocking)
        else:
            target.copy_(source)
        return target


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
        stack.enter_context(patch.object(InterpretedFunction, "run", launch))
        stack.enter_context(_Functions(gpu))
        yield gpu


_HostGenerator = torch.Generator


def _check_generator(kwargs: dict[str, Any], device: torch.device) -> None:
    generator = kwargs.get("generator")
    if generator is not None and isinstance(generator, DeviceGenerator) != (device.type == "cuda"):
        raise RuntimeError(f"Expected a '{device.type}' device type for generator but found another")


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory_of(leaf: Any) -> Any:
    """What the CPU computes with in its place."""
    return leaf.memory if isinstance(leaf, DeviceTensor) else leaf


def _address(memory: Tensor) -> int:
    return memory.untyped_storage().data_ptr()


def _spoil(memory: Tensor) -> None:
    """Writes numbers that no result should show."""
    if memory.is_floating_point():
        memory.fill_(torch.nan)
    elif memory.dtype is not torch.bool:
        memory.fill_(torch.iinfo(memory.dtype).max // 2)


def _has_same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(a.numpy().tobytes() == b.numpy().tobytes())
