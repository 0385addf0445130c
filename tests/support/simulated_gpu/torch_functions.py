"""What torch's functions do with tensors of the simulated device, and what they refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from tests.support.simulated_gpu.device import (
    DEVICE,
    DeviceGenerator,
    DeviceTensor,
    SimulatedGpu,
    memory_of,
    tensors_in,
)

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


class DeviceFunctions(TorchFunctionMode):
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
        if func is torch.tensor or func is torch.as_tensor or tensors_in((args, kwargs)):
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
        bare_args, bare_kwargs = tree_map(memory_of, (args, kwargs))
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
        hosts = [tensor for tensor in tensors_in((args, kwargs)) if not isinstance(tensor, DeviceTensor)]
        if name in _INDEXING:
            assert isinstance(args[0], DeviceTensor), "a tensor of the host is indexed by one of the device"
            if hosts or any(tensor.dtype is torch.bool for tensor in tensors_in(args[1])):
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


def _check_generator(kwargs: dict[str, Any], device: torch.device) -> None:
    generator = kwargs.get("generator")
    if generator is not None and isinstance(generator, DeviceGenerator) != (device.type == "cuda"):
        raise RuntimeError(f"Expected a '{device.type}' device type for generator but found another")
