"""One way to run compiled operations: as a program, by a team of so many threads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.numba.ops.linear import SCRATCH_BYTES
from kernels.numba.program.program import NUM_STEP_FIELDS, Operation, Step
from kernels.numba.program.team import Program, Team, operation


class Execute:
    """Runs operations on the rows of a step. Teams are made once for each number of threads."""

    def __init__(self) -> None:
        self._teams: dict[int, Team] = {}

    def __call__(
        self,
        operations: Sequence[list[int]],
        *,
        num_rows: int,
        num_threads: int = 1,
        fields: dict[Step, Tensor] | None = None,
        numbers: dict[Step, int] | None = None,
    ) -> None:
        """fields: further entries of the step, whose addresses go in; numbers: others, as they are"""
        step = torch.zeros(NUM_STEP_FIELDS, dtype=torch.int64)
        step[Step.ROWS] = num_rows
        for field, tensor in (fields or {}).items():
            step[field] = tensor.data_ptr()
        for field, number in (numbers or {}).items():
            step[field] = number
        if num_threads not in self._teams:
            self._teams[num_threads] = Team(num_threads, scratch_bytes=SCRATCH_BYTES)
        self._teams[num_threads].run(Program(operations, step))


@pytest.fixture(scope="session")
def execute() -> Execute:
    return Execute()


@pytest.fixture
def op():
    """Makes an operation from numbers, and from tensors, of which it takes the addresses."""

    def make(kind: Operation, *fields: int | Tensor, factors: tuple[float, float] = (0.0, 0.0)) -> list[int]:
        numbers = [field.data_ptr() if isinstance(field, Tensor) else field for field in fields]
        return operation(kind, *numbers, factors=factors)

    return make


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
