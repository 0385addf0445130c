"""How fast are compiled products? `python -m loadtest.micro.products [--kinds int4,int8] [--rows 1,4,32] [--save]`

Medians of GOP/s and GB/s, one thread multiplying rows by packed matrices of 3,072 x 576 (x 768, where formats need a
multiple of 256), one matrix after another that is in no cache, by format and number of rows.
`loadtest.micro.instruction_rates` has what they cannot exceed.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from torch import Tensor

from engine.quantization.huge_pages import HugePages
from kernels.numba.core.formats import (
    BFLOAT16,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    GROUP,
    INTEGERS,
    QUADS,
    ROUNDED_BFLOAT16,
    Levels,
)
from kernels.numba.core.processor import level
from kernels.numba.ops.linear import SCRATCH_BYTES, product_address
from kernels.numba.packing.packing import PackedMatrix, pack, pack_levels
from kernels.numba.program.program import NUM_STEP_FIELDS, Operation, Step
from kernels.numba.program.team import Program, Team, operation
from loadtest.micro.measure import Row, fastest, parse_numbers, print_table, save

NUM_OUTPUTS, DEPTH = 3072, 576  # SmolLM2-135M's widest matrix
SUPER_DEPTH = 768  # the next depth that formats with scales of two levels have
STREAMED_BYTES = 160 << 20
KINDS = {
    "float32": FLOAT32,
    "float16": FLOAT16,
    "bfloat16": BFLOAT16,
    "bfloat16 x bfloat16": ROUNDED_BFLOAT16,
    "FP8": FLOAT8,
    **{one.name.replace(", by activations of", " x"): kind for kind, one in INTEGERS.items()},
}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    team, rows = Team(1, scratch_bytes=SCRATCH_BYTES), list[Row]()
    products = {name: _Products(KINDS[name], max(options.rows), options.depth) for name in options.kinds}
    for num_rows in options.rows:
        rounds: dict[str, list[float]] = {name: [] for name in products}
        for _ in range(options.rounds):  # in turns, so that others' load meets all kinds alike
            for name, programs in products.items():
                programs.step[Step.ROWS] = num_rows
                work = partial(programs.run, team)
                rounds[name].append(fastest(work, num_calls=len(programs.programs), num_rounds=0))
        for name, programs in products.items():
            seconds, num_weights = statistics.median(rounds[name]), NUM_OUTPUTS * programs.depth
            rates = {
                "GOP/s": 2 * num_rows * num_weights / seconds / 1e9,
                "GB/s": programs.matrix.num_bytes / seconds / 1e9,
                "ns/1000 weights": 1e12 * seconds / num_weights,
                "fastest": 1e12 * min(rounds[name]) / num_weights,
            }
            rows.append({"product": name, "rows": num_rows, **rates, "level": level().name})
    print_table(rows)
    if options.save:
        print(f"\n{save(options.name, rows)}")
    return 0


class _Products:
    """Programs of one product each, with copies of one matrix that together are in no cache. Rows are zeros, which take
    as long as others."""

    def __init__(self, kind: int, num_rows: int, depth: int | None) -> None:
        self.depth = depth or (SUPER_DEPTH if kind in INTEGERS and INTEGERS[kind].is_two_level else DEPTH)
        self.matrix = matrix = _matrix(kind, self.depth)
        self.step = torch.zeros(NUM_STEP_FIELDS, dtype=torch.int64)
        self._x = torch.zeros(num_rows, self.depth)  # of any element up to float32
        self._factors = torch.zeros(num_rows, self.depth // GROUP, 4)
        self._out = torch.empty(num_rows, NUM_OUTPUTS)
        memory = HugePages()
        copies = range(max(1, STREAMED_BYTES // matrix.num_bytes))
        self.programs = [self._program(kind, matrix, memory) for _ in copies]

    def run(self, team: Team, index: int) -> None:
        team.run(self.programs[index])

    def _program(self, kind: int, matrix: PackedMatrix, memory: HugePages) -> Program:
        values, scales = _copy(matrix.values, memory), _copy(matrix.scales, memory)
        multiply = operation(
            Operation.MULTIPLY, product_address(kind), self._x.data_ptr(), self._factors.data_ptr(), self.depth,
            values.data_ptr(), scales.data_ptr(), matrix.num_panels, 16, self._out.data_ptr(), NUM_OUTPUTS, 0,
        )  # fmt: skip
        return Program([multiply], self.step, keeps=(values, scales))


def _matrix(kind: int, depth: int) -> PackedMatrix:
    weights = INTEGERS.get(kind)
    if kind == FLOAT8:
        numbers = torch.randn(NUM_OUTPUTS, depth).to(torch.float8_e4m3fn).view(torch.uint8)
        return pack_levels(Levels(kind, numbers, torch.ones(NUM_OUTPUTS, depth // GROUP, 1)), kind)
    if weights is None:
        return pack(torch.randn(NUM_OUTPUTS, depth), BFLOAT16 if kind == ROUNDED_BFLOAT16 else kind)
    levels = torch.randint(0, 1 << min(weights.bits, 7), (NUM_OUTPUTS, depth))
    shape, dtype = (NUM_OUTPUTS, depth // GROUP, weights.num_factors), torch.float16
    commons = torch.ones(NUM_OUTPUTS, depth // 256, 1 + weights.has_offsets, dtype=dtype)
    if weights.scales != "float16":
        dtype = torch.int8 if weights.is_two_level else getattr(torch, weights.scales)
    levels = levels.to(torch.int8 if weights.bits == 8 else torch.uint8)
    return pack_levels(Levels(kind & ~QUADS, levels, torch.ones(shape, dtype=dtype), commons), kind)


def _copy(tensor: Tensor, memory: HugePages) -> Tensor:
    return memory.empty(tensor.shape, tensor.dtype).copy_(tensor) if tensor.numel() else tensor


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.micro.products", description=__doc__)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--rows", type=parse_numbers, default=[1, 2, 4, 8, 16, 32, 96])
    parser.add_argument("--depth", type=int, help=f"of all matrices ({DEPTH}, or {SUPER_DEPTH} where that is needed)")
    parser.add_argument("--rounds", type=int, default=7, help="whose median counts (7)")
    parser.add_argument("--save", action="store_true", help="write the rows to loadtest/results")
    parser.add_argument("--name", default="products-1t", help="of that file (products-1t)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.kinds if name not in KINDS]:
        parser.error(f"no kind of product is called {', '.join(unknown)}; there are: {', '.join(KINDS)}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
