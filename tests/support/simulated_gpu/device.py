"""The simulated device: memory that is counted, work that is queued, and graphs that repeat it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)


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
        for kept, new in zip(self.outputs, tensors_in(self.func(*self.args, **self.kwargs)), strict=True):
            if (address_of(kept), kept.storage_offset()) != (address_of(new), new.storage_offset()):
                kept.copy_(new)


@dataclass
class _Capture:
    """outputs: memory that was allocated within; known: addresses of memory that was used"""

    operations: list[_Operation] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    known: set[int] = field(default_factory=set)

    def add(self, operation: _Operation) -> None:
        self.operations.append(operation)
        self.known |= {address_of(tensor) for tensor in tensors_in((operation.args, operation.kwargs))}
        self.outputs += [tensor for tensor in operation.outputs if address_of(tensor) not in self.known]
        self.known |= {address_of(tensor) for tensor in operation.outputs}


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
        address = address_of(memory)
        allocation = self._allocations.get(address)
        if allocation is None:
            allocation = Allocation(self, memory.untyped_storage().nbytes())
            if address:
                self._allocations[address] = allocation
        return DeviceTensor(memory, allocation)

    def pin(self, memory: Tensor) -> Tensor:
        memory.is_simulated_pinned = True
        self._pinned[address_of(memory)] = memory.untyped_storage()
        return memory

    def is_pinned(self, memory: Tensor) -> bool:
        return address_of(memory) in self._pinned

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
            spoil(target)
        else:
            self.wait()
            target.copy_(source.memory)

    def compute(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operation on the memory of its arguments. Returns its outputs, on the device."""
        wrappers = {id(leaf.memory): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeviceTensor)}
        bare_args, bare_kwargs = tree_map(memory_of, (args, kwargs))
        result = func(*bare_args, **bare_kwargs)
        self._queue(_Operation(func, bare_args, bare_kwargs, tensors_in(result)))

        def on_device(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return wrappers[id(leaf)] if id(leaf) in wrappers else self.wrap(leaf)

        return tree_map(on_device, result)

    def launch(self, kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(not isinstance(tensor, DeviceTensor) for tensor in tensors_in((args, kwargs))):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        self.num_launches += 1
        bare_args, bare_kwargs = tree_map(memory_of, (args, kwargs))
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
            spoil(output)

    def replay(self) -> None:
        assert self._captured is not None, "nothing was captured"
        assert self._gpu.capture is None, "a replay while another graph is captured"
        self._gpu.num_replays += 1
        for other in self._pool.graphs:
            if other is not self:
                other.spoil()
        for operation in self._captured.operations:
            operation.repeat()


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def memory_of(leaf: Any) -> Any:
    """What the CPU computes with in its place."""
    return leaf.memory if isinstance(leaf, DeviceTensor) else leaf


def address_of(memory: Tensor) -> int:
    return memory.untyped_storage().data_ptr()


def spoil(memory: Tensor) -> None:
    """Writes numbers that no result should show."""
    if memory.is_floating_point():
        memory.fill_(torch.nan)
    elif memory.dtype is not torch.bool:
        memory.fill_(torch.iinfo(memory.dtype).max // 2)


def _has_same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(a.numpy().tobytes() == b.numpy().tobytes())
