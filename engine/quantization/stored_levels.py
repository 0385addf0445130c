"""Matrices of a checkpoint that are integers and scales already, and stay so until they are packed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.numba.core.formats import Levels


@dataclass(frozen=True, slots=True)
class StoredLevels(ABC):
    """A matrix as a file has it, often its very pages; rows are read when somebody wants them, by any threads.

    kind: the format of `kernels.numba.core.formats` that holds it as it is; None: there is none, so it becomes floats
    label: what the file calls it, for people, where that is not the kind's name
    order: int64 [depth], the element of a row that each column of the levels belongs to; None: its own
    """

    shape: tuple[int, int]
    kind: int | None

    label: str = field(default="", kw_only=True)
    order: Tensor | None = field(default=None, kw_only=True)

    @abstractmethod
    def levels(self, start: int, stop: int) -> Levels:
        """Some rows. ValueError where their scales are no numbers."""

    @abstractmethod
    def dense(self, start: int, stop: int) -> Tensor:
        """Some rows as they are multiplied, [stop - start, depth] float32."""

    def __len__(self) -> int:
        return self.shape[0]


def as_floats(tensor: Tensor | StoredLevels) -> Tensor:
    """The whole of it."""
    return tensor if isinstance(tensor, Tensor) else tensor.dense(0, len(tensor))


def floats_of(tensor: Tensor | StoredLevels, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Some rows; a view where they are in this dtype."""
    rows = tensor[start:stop] if isinstance(tensor, Tensor) else tensor.dense(start, stop)
    return rows.to(dtype)
