"""The peak of memory while a model is loaded: every weight as it is built, and what packing the next matrices takes.

A model is built whole in its dtype; then its matrices are packed, each of which frees its floats. So the peak comes
early, while nearly all is still floats, and is far above what stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

COMPILER_BYTES = 128 << 20  # Numba and LLVM, once imported
INT8_BYTES = 1.0625  # a byte, and a scale for each 32 weights
OTHER_BYTES = 32 << 20  # tokenizer, configs, and what a load leaves in caches
_COMPILED_SCRATCH = {"none": 8, "fp16": 4, "int8": 5, "int4": 8}  # bytes per float32 weight that is being packed
_COMPARED = 6  # where it may be what a file holds in 16 bits: there, back again, and compared
_TORCH_SCRATCH = {"fp16": 4, "int8": 8}  # "none" makes two copies
_COPY = 4  # more, where a weight is first copied to float32


class Matrix(NamedTuple):
    """A matrix of a linear layer, in the order in which they are packed."""

    num_weights: int
    is_output: bool = False  # the products are the logits
    is_shared: bool = False  # with the embedding, which keeps the floats


@dataclass(frozen=True, slots=True)
class WeightSizes:
    """Bytes per weight: as the model is built, as packed, and what packing takes beside the floats.

    output: of the output layer, as packed, which int4 keeps in int8; num_at_once: matrices that are packed together
    """

    built: int
    packed: float
    output: float
    scratch: int
    output_scratch: int
    num_at_once: int


def weight_sizes(
    kernels: str, quantization: str, *, built: int, packed: float, is_random: bool, num_threads: int
) -> WeightSizes:
    """kernels, quantization: as resolved; built: bytes of a weight in the model's dtype; packed: as kept, at most;
    is_random: no format holds every weight exactly, which shows at the first"""
    is_compiled = kernels == "numba"
    num_at_once = num_threads if is_compiled or quantization == "fp16" else 1

    def scratch_of(name: str) -> int:
        copy = 0 if built == 4 else _COPY
        if is_compiled:
            is_exact = not is_random or built < 4  # random numbers of 16 bits are numbers of 16 bits
            return copy + max(_COMPILED_SCRATCH[name], _COMPARED if is_exact else 0)
        return 2 * built if name == "none" else copy + _TORCH_SCRATCH[name]

    scratch = scratch_of(quantization)
    if quantization == "int4":
        return WeightSizes(built, packed, INT8_BYTES, scratch, scratch_of("int8"), num_at_once)
    return WeightSizes(built, packed, packed, scratch, scratch, num_at_once)


def loading_peak(num_parameters: int, matrices: Sequence[Matrix], sizes: WeightSizes) -> int:
    """Bytes, beside those of the process itself and file pages that the kernel can drop."""
    held: float = num_parameters * sizes.built
    peak = held
    for place, matrix in enumerate(matrices):
        in_work = matrices[place : place + sizes.num_at_once]
        scratch = [one.num_weights * (sizes.output_scratch if one.is_output else sizes.scratch) for one in in_work]
        peak = max(peak, held + sum(scratch))
        kept = sizes.output if matrix.is_output else sizes.packed
        held += matrix.num_weights * (kept - (0 if matrix.is_shared else sizes.built))
    return int(max(peak, held)) + OTHER_BYTES
