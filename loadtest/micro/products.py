"""How fast are compiled products? `python -m loadtest.micro.products [--kinds int4,int8] [--rows 1,4,32] [--save]`

GOP/s and GB/s of one thread multiplying rows by packed matrices of 3,072 x 576, one matrix after another that is in no
cache, by format and number of rows. `loadtest.micro.instruction_rates` has what they cannot exceed.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

from engine.quantization.huge_pages import HugePages
from kernels.numba.core.formats import (
    BFLOAT16,
    FLOAT32,
    INT4,
    INT8,
    QUAD_INT4,
    QUAD_INT8,
    ROUNDED_BFLOAT16,
)
from kernels.numba.core.lanes import GROUP
from kernels.numba.core.processor import level
from kernels.numba.ops.linear import SCRATCH_BYTES
from kernels.numba.packing.packing import PackedMatrix, in_quads, pack
from kernels.numba.program.program import NUM_STEP_FIELDS, Operation, Step
from kernels.numba.program.team import Program, Team, operation
from loadtest.micro.measure import Row, fastest, parse_numbers, print_table, save

NUM_OUTPUTS, DEPTH = 3072, 576  # SmolLM2-135M's widest matrix
STREAMED_BYTES = 160 << 20
KINDS = {
    "float32": FLOAT32,
    "bfloat16": BFLOAT16,
    "bfloat16 x bfloat16": ROUNDED_BFLOAT16,
    "int8": INT8,
    "int4": INT4,
    "int8 x 8 bits": QUAD_INT8,
    "int4 x 8 bits": QUAD_INT4,
}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    team, rows = Team(1, scratch_bytes=SCRATCH_BYTES), list[Row]()
    for name in options.kinds:
        programs = _Products(KINDS[name], max(options.rows))
        for num_rows in options.rows:
            programs.step[Step.ROWS] = num_rows
            seconds = fastest(partial(programs.run, team), num_calls=len(programs.programs), num_rounds=options.rounds)
            rates = {
                "GOP/s": 2 * num_rows * DEPTH * NUM_OUTPUTS / seconds / 1e9,
                "GB/s": programs.matrix.num_bytes / seconds / 1e9,
            }
            rows.append({"product": name, "rows": num_rows, **rates, "level": level().name})
    print_table(rows)
    if options.save:
        print(f"\n{save('products-1t', rows)}")
    return 0


class _Products:
    """Programs of one product each, with copies of one matrix that together are in no cache. Rows are zeros, which take
    as long as others."""

    def __init__(self, kind: int, num_rows: int) -> None:
        packed = {ROUNDED_BFLOAT16: BFLOAT16, QUAD_INT8: INT8, QUAD_INT4: INT4}.get(kind, kind)
        matrix = pack(torch.randn(NUM_OUTPUTS, DEPTH), packed)
        self.matrix = matrix = in_quads(matrix) if kind in (QUAD_INT8, QUAD_INT4) else matrix
        self.step = torch.zeros(NUM_STEP_FIELDS, dtype=torch.int64)
        self._x = torch.zeros(num_rows, DEPTH)  # of any element up to float32
        self._factors = torch.zeros(num_rows, DEPTH // GROUP, 4)
        self._out = torch.empty(num_rows, NUM_OUTPUTS)
        memory = HugePages()
        copies = range(max(1, STREAMED_BYTES // matrix.num_bytes))
        self.programs = [self._program(kind, matrix, memory) for _ in copies]

    def run(self, team: Team, index: int) -> None:
        team.run(self.programs[index])

    def _program(self, kind: int, matrix: PackedMatrix, memory: HugePages) -> Program:
        values, scales = _copy(matrix.values, memory), _copy(matrix.scales, memory)
        multiply = operation(
            Operation.MULTIPLY, kind, self._x.data_ptr(), self._factors.data_ptr(), DEPTH, values.data_ptr(),
            scales.data_ptr(), matrix.num_panels, 16, self._out.data_ptr(), NUM_OUTPUTS, 0,
        )  # fmt: skip
        return Program([multiply], self.step, keeps=(values, scales))


def _copy(tensor: Tensor, memory: HugePages) -> Tensor:
    return memory.empty(tensor.shape, tensor.dtype).copy_(tensor) if tensor.numel() else tensor


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.micro.products", description=__doc__)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--rows", type=parse_numbers, default=[1, 2, 4, 8, 16, 32, 96])
    parser.add_argument("--rounds", type=int, default=7, help="of which the fastest counts (7)")
    parser.add_argument("--save", action="store_true", help="write the rows to loadtest/results")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.kinds if name not in KINDS]:
        parser.error(f"no kind of product is called {', '.join(unknown)}; there are: {', '.join(KINDS)}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
