"""A safetensors file that is written a tensor at a time: its header names all of them before the first is there.

The library's own writer wants a whole file in memory. The format is a length of 8 bytes, a header of JSON, and the
tensors one after the other (https://huggingface.co/docs/safetensors, "Format"); wide elements come first, so that each
tensor begins at a multiple of its element's size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from engine.compression.weight_scheme import WIDTHS, TensorShape

_ALIGNMENT = 8  # of the first tensor
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


class TensorFile:
    """One file, open. Its tensors may come in any order, each once; leaving the `with` has them all on the disk."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorShape]) -> None:
        """tensors: all that there will be, by name. OSError where the file cannot be made, or its disk is full."""
        self.path = path
        self._tensors = tensors
        self._places: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(tensors, key=lambda name: -WIDTHS[tensors[name][0]]):
            dtype, shape = tensors[name]
            self._places[name], end = end, end + WIDTHS[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._places[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._first = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._first + end)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                assert not self._places, f"{len(self._places)} tensors were never written"
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, name: str, tensor: Tensor) -> None:
        dtype, shape = self._tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (_DTYPES[dtype], shape), f"{name}: {tensor.dtype} {tensor.shape}"
        self._file.seek(self._first + self._places.pop(name))
        octets = tensor.contiguous().reshape(-1).view(torch.uint8)
        self._file.write(octets.numpy().data)
