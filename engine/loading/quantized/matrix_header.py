"""A quantised matrix as the headers of its files describe it, and the checks that all methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from engine.loading.stored_weights import StoredTensor
from engine.quantization.stored_levels import StoredLevels
from kernels.numba.core.formats import GROUP, INT4_ZEROS, INT6, INT8, INT8_ZEROS, Q4_0, Q5_0

Tensors = Mapping[str, Tensor]  # of one matrix, by the last words of their names
Headers = Mapping[str, StoredTensor]  # likewise


@dataclass(frozen=True, slots=True)
class MatrixHeader:
    """What is known before anything is read.

    shape: [num_rows, depth], as a model has it; label: the format, for people
    kind: the format that compiled layers are expected to keep it in; None: they keep floats
    why_float: then, why; tensors: those that `read` wants, by the last words of their names
    """

    shape: tuple[int, int]
    label: str
    kind: int | None
    why_float: str
    tensors: Headers
    read: Callable[[Tensors], StoredLevels]


def expect_shape(tensors: Headers, name: str, shape: tuple[int, ...]) -> None:
    """ValueError unless a tensor is there and has that shape."""
    found = tensors.get(name)
    if found is None:
        raise ValueError(f"it has no {name}; download the checkpoint again")
    if found.shape != shape:
        raise ValueError(f"its {name} has shape {list(found.shape)}, but {list(shape)} goes with the rest of it")


def expect_dimensions(tensors: Headers, name: str, count: int) -> tuple[int, ...]:
    """The shape of a tensor. ValueError unless it is there, with so many dimensions and an element."""
    found = tensors.get(name)
    if found is None:
        raise ValueError(f"it has no {name}; download the checkpoint again")
    if len(found.shape) != count or 0 in found.shape:
        raise ValueError(f"its {name} has shape {list(found.shape)}, but it must have {count} dimensions")
    return found.shape


def expect_dtype(tensors: Headers, name: str, *dtypes: str) -> None:
    """dtypes: as safetensors names them"""
    found = tensors[name].dtype
    if found not in dtypes:
        raise ValueError(f"its {name} is {found}, but it must be {' or '.join(dtypes)}")


def expect_finite(values: Tensor, name: str) -> Tensor:
    """ValueError for scales that are infinite or no numbers: every weight under them would be."""
    if not bool(values.float().isfinite().all()):
        raise ValueError(f"its {name} has elements that are infinite or no numbers; the file is damaged")
    return values


def num_groups(depth: int, group_size: int) -> int:
    return math.ceil(depth / group_size)


def group_label(depth: int, group_size: int) -> str:
    return "a scale for each output" if group_size >= depth else f"groups of {group_size}"


def fits_chunks(depth: int, group_size: int) -> bool:
    """Whether each group is made of whole groups of compiled layers."""
    return depth % GROUP == 0 and (group_size >= depth or group_size % GROUP == 0)


def why_not_chunks(depth: int, group_size: int) -> str:
    if depth % GROUP:
        return f"its {depth} inputs are no multiple of {GROUP}"
    return f"groups of {group_size} are not made of whole groups of {GROUP}"


def kind_of_integers(bits: int, *, has_zeros: bool) -> int:
    """The compiled format that integers are expected to stay in, from -2^(bits - 1) on or less a zero of each group.

    Less a zero, b bits have b + 1; of 2 and 3 bits, the zero lies near the middle.
    """
    if has_zeros:
        few = Q4_0 if bits < 4 else INT4_ZEROS if bits == 4 else INT6 if bits == 5 else INT8
        return few if bits < 8 else INT8_ZEROS
    return Q4_0 if bits <= 4 else Q5_0 if bits == 5 else INT6 if bits == 6 else INT8


def kept_integers(bits: int, depth: int, group_size: int, *, has_zeros: bool) -> tuple[int | None, str]:
    """(the format that compiled layers are expected to keep them in, or why they do not)"""
    if not fits_chunks(depth, group_size):
        return None, why_not_chunks(depth, group_size)
    return kind_of_integers(bits, has_zeros=has_zeros), ""


def transposed_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Columns of a tensor [any, num_rows], as rows: [n, any]."""
    return tensor[:, start:stop].T.contiguous()


FLOAT_TYPES = ("F16", "BF16", "F32")
