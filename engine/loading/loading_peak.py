"""The peak of memory while a model is loaded: what stays of it, and the floats of the largest matrix.

A matrix is packed as soon as the last part of it is read, and its floats are freed before the next is made. When it
comes is up to the file, so the largest is counted as the last. Compiled layers take what they can keep as it is out of
the file's pages some rows at a time, so that of those there are no floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

COMPILER_BYTES = 128 << 20  # Numba and LLVM, once imported
OTHER_BYTES = 32 << 20  # tokenizer, configs, the rows that threads have in work, and what a load leaves in caches
READ_BYTES = 4  # of a weight as it is read, where it becomes float32, whatever the model's dtype


class Matrix(NamedTuple):
    """A matrix of a linear layer."""

    num_weights: int
    is_output: bool = False  # the products are the logits
    is_shared: bool = False  # with the embedding, which keeps the floats
    exact_bytes: float | None = None  # per weight, in which compiled layers keep what the file has, if they can
    is_of_experts: bool = False  # of a layer's experts, one on top of the other
    code_bytes: float | None = None  # per weight, in which a GPU keeps what the file has, if it can


@dataclass(frozen=True, slots=True)
class WeightSizes:
    """Bytes per weight that a matrix takes beside its place in what stays, until that is filled.

    floats: as it is read or made; scratch: what packing takes beside those
    """

    floats: int
    scratch: int = 0


def loading_peak(stays: int, matrices: Sequence[Matrix], sizes: WeightSizes) -> int:
    """Bytes, beside those of the process itself and file pages that the kernel can drop. stays: when all is loaded"""
    taken = [one.num_weights * ((0 if one.is_shared else sizes.floats) + sizes.scratch) for one in matrices]
    return stays + max(taken, default=0) + OTHER_BYTES
