"""Matrices of drafters, as small as guesses allow.

What a draft costs on a CPU is reading them, so they are kept in int8; that a guess's score is off by a hundredth costs
nothing, since the target checks it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from engine.models.llama_numba import OutputProgram

_GROUP = 32  # elements of a row that share a scale in int8


class DraftMatrix(Protocol):
    """[num_rows, depth]"""

    num_rows: int
    num_bytes: int

    def multiply(self, x: Tensor) -> Tensor:
        """x @ matrix.T. [n, depth] float32 -> [n, num_rows] float32, in new memory"""
        ...


def make_draft_matrix(matrix: Tensor) -> DraftMatrix:
    """matrix: floats, on the device that will multiply"""
    is_compiled = matrix.device.type == "cpu" and matrix.shape[1] % _GROUP == 0
    return _CompiledMatrix(matrix) if is_compiled else _PlainMatrix(matrix)


class _PlainMatrix:
    """float32 on a CPU, float16 elsewhere, multiplied by torch."""

    def __init__(self, matrix: Tensor) -> None:
        self._values = matrix.float() if matrix.device.type == "cpu" else matrix.half()
        self.num_rows, self.num_bytes = len(matrix), self._values.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self._values.dtype), self._values).float()


class _CompiledMatrix:
    """int8 in panels, multiplied by the calling thread alone: for the few rows of a draft, waking others takes longer.

    Of 8,192 rows and a depth of 576, a product with up to 3 rows takes 0.4 ms where the matrix is in no cache.
    """

    def __init__(self, matrix: Tensor) -> None:
        from kernels.numba.core.formats import INT8  # which compile where no start has compiled them yet
        from kernels.numba.ops.linear import SCRATCH_BYTES
        from kernels.numba.packing.packing import Stack, pack
        from kernels.numba.program.team import Team

        self._packed = Stack((pack(matrix.float(), INT8),))
        self._team = Team(1, scratch_bytes=SCRATCH_BYTES)
        self._program: OutputProgram | None = None
        self.num_rows, self.num_bytes = len(matrix), self._packed.num_bytes

    def multiply(self, x: Tensor) -> Tensor:
        return self._program_for(len(x)).multiply(x, self._team)[:, : self.num_rows].clone()

    def _program_for(self, num_inputs: int) -> OutputProgram:
        from engine.models.llama_numba import OutputProgram
        from engine.models.products import Products

        if self._program is None or self._program.num_rows < num_inputs:
            self._program = OutputProgram(self._packed, num_inputs, Products(1, rounds_to_bfloat16=False))
        return self._program
