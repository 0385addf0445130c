"""Memory for weights in pages of 2 MiB: what each step reads from front to end crosses 500 times fewer pages."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 32 << 20  # bytes that are asked for at once, whole huge pages; the last one stays half empty
_LINE = 64


class HugePages:
    """Hands out such memory, where the kernel gives it on request (madvise(2), MADV_HUGEPAGE); to any threads.

    Nothing is freed before all tensors of a chunk are.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, not initialised."""
        return self._take(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))

    def give_back(self, tensor: Tensor) -> None:
        """Takes the newest tensor back, unless others have been handed out since; it must not be used any more."""
        with self._lock:
            start = tensor.data_ptr() - self._chunk.data_ptr()
            if 0 <= start < len(self._chunk) and start + _in_lines(tensor.nbytes) == self._used:
                self._used = start

    def _take(self, num_bytes: int) -> Tensor:
        with self._lock:
            if self._used + num_bytes > len(self._chunk):
                self._chunk, self._used = _allocate(max(num_bytes, _CHUNK)), 0
            taken = self._chunk[self._used : self._used + num_bytes]
            self._used += _in_lines(num_bytes)
        return taken


def _in_lines(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE


def _allocate(num_bytes: int) -> Tensor:
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
