"""A team of threads: the same bits whatever their number, asleep or awake, and no trace of them afterwards."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.numba.core.formats import FLOAT32, GROUP, INT4
from kernels.numba.ops.linear import SCRATCH_BYTES, product_address
from kernels.numba.packing.packing import pack
from kernels.numba.program.program import NUM_STEP_FIELDS, Operation, Step
from kernels.numba.program.team import Program, Team
from tests import ROOT

WIDTH = 96
NAMES = ["NORMALISE", "QUANTISE", "MULTIPLY", "SILU_AND_MULTIPLY", "MULTIPLY"]  # of a turn of the chain
MakeTeam = Callable[[int], Team]


@pytest.fixture
def make_team() -> MakeTeam:
    return lambda num_threads: Team(num_threads, scratch_bytes=SCRATCH_BYTES)


class Chain:
    """Operations of which each needs the one before it: norm, rounding, product, activation, product, several times.

    One that began before another's end would read what is not there yet.
    """

    def __init__(self, op, *, num_rows: int, num_turns: int) -> None:
        width = 2 * WIDTH
        self.x = torch.randn(num_rows, WIDTH)
        self.out = torch.empty(num_rows, WIDTH)
        normed, wide, narrow = torch.empty(num_rows, WIDTH), torch.empty(num_rows, width), torch.empty(num_rows, WIDTH)
        integers, scales = torch.empty(num_rows, WIDTH, dtype=torch.int16), torch.empty(num_rows, WIDTH // GROUP, 4)
        up, down = pack(torch.randn(width, WIDTH), INT4), pack(torch.randn(WIDTH, WIDTH), FLOAT32)
        up_sizes, down_sizes, weight = (up.num_panels, 2), (down.num_panels, 2), torch.ones(WIDTH)
        self.step = torch.zeros(NUM_STEP_FIELDS, dtype=torch.int64)
        self.step[Step.ROWS] = num_rows
        operations = []
        for _ in range(num_turns):
            operations += [
                op(Operation.NORMALISE, self.out, weight, normed, WIDTH, factors=(1e-6, 0.0)),
                op(Operation.QUANTISE, normed, integers, scales, WIDTH),
                op(
                    Operation.MULTIPLY,
                    product_address(INT4),
                    integers,
                    scales,
                    WIDTH,
                    up.values,
                    up.scales,
                    *up_sizes,
                    wide,
                    width,
                    0,
                ),
                op(Operation.SILU_AND_MULTIPLY, wide, narrow, WIDTH),
                op(
                    Operation.MULTIPLY,
                    product_address(FLOAT32),
                    narrow,
                    0,
                    WIDTH,
                    down.values,
                    0,
                    *down_sizes,
                    self.out,
                    WIDTH,
                    1,
                ),
            ]
        parts = (normed, wide, narrow, integers, scales, up.values, up.scales, down.values, weight)
        self.program = Program(operations, self.step, keeps=parts)

    def run(self, team: Team) -> Tensor:
        self.out.copy_(self.x)
        team.run(self.program)
        return self.out.clone()


def kernel_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread not in before]


@pytest.mark.parametrize("num_rows", [1, 9, 100])
def test_every_number_of_threads_gives_the_same_bits(op, make_team: MakeTeam, num_rows: int) -> None:
    chain = Chain(op, num_rows=num_rows, num_turns=6)
    alone = chain.run(make_team(1))
    assert alone.isfinite().all()
    assert not torch.equal(alone, chain.x)
    for num_threads in (2, 4):
        team = make_team(num_threads)
        for _ in range(10):
            assert torch.equal(chain.run(team), alone)


def test_programs_follow_one_another_on_one_team(op, make_team: MakeTeam) -> None:
    rng = random.Random(0)
    chains = [Chain(op, num_rows=num_rows, num_turns=turns) for num_rows, turns in ((1, 1), (5, 3), (40, 2), (1, 8))]
    expected = [chain.run(make_team(1)) for chain in chains]
    team = make_team(3)
    for _ in range(400):
        which = rng.randrange(len(chains))
        assert torch.equal(chains[which].run(team), expected[which])


def test_a_program_may_run_for_another_number_of_rows(op, make_team: MakeTeam) -> None:
    chain, team = Chain(op, num_rows=20, num_turns=2), make_team(2)
    whole = chain.run(team)
    chain.step[Step.ROWS] = 7
    part = chain.run(team)
    assert torch.equal(part[:7], whole[:7])
    assert torch.equal(part[7:], chain.x[7:])


def test_sleeping_threads_wake_for_the_next_program(op, make_team: MakeTeam) -> None:
    chain, team = Chain(op, num_rows=30, num_turns=3), make_team(3)
    expected = chain.run(make_team(1))
    for _ in range(5):
        time.sleep(0.02)  # they watch for a tenth of a millisecond or so
        assert torch.equal(chain.run(team), expected)


def test_an_empty_program_and_one_of_no_rows_end(op, make_team: MakeTeam) -> None:
    team = make_team(2)
    team.run(Program([], torch.zeros(NUM_STEP_FIELDS, dtype=torch.int64)))
    chain = Chain(op, num_rows=3, num_turns=1)
    chain.step[Step.ROWS] = 0
    assert torch.equal(chain.run(team), chain.x)


def test_the_time_of_every_operation_is_noted(op, make_team: MakeTeam) -> None:
    chain = Chain(op, num_rows=8, num_turns=4)
    team = make_team(2)
    expected = chain.run(team)
    with team.timing() as programs:
        for _ in range(3):
            assert torch.equal(chain.run(team), expected)
    chain.run(team)  # which nobody asked to time
    assert len(programs) == 3
    for program in programs:
        assert [operation.name for operation in program.operations] == 4 * NAMES
        assert len(program.cycles) == 1 + len(program.operations)
        assert program.cycles[0] > 0
        assert all(before < after for before, after in pairwise(program.cycles))
        assert program.start < program.end
    assert programs[0].cycles[-1] < programs[1].cycles[0]


def test_threads_end_when_their_team_is_dropped(op, make_team: MakeTeam) -> None:
    before = set(threading.enumerate())
    chain, teams = Chain(op, num_rows=10, num_turns=1), [make_team(3), make_team(2)]
    for team in teams:
        chain.run(team)
    started = kernel_threads(before)
    assert len(started) == 3  # the caller is one of each team
    del teams, team
    gc.collect()
    for thread in started:
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_an_interpreter_ends_quietly_with_a_team_in_it(pause: float) -> None:
    code = f"""
import time, torch
from kernels.numba.program.program import NUM_STEP_FIELDS, Operation, Step
from kernels.numba.program.team import Program, Team, operation
x, bias, step = torch.zeros(50, 32), torch.ones(32), torch.zeros(NUM_STEP_FIELDS, dtype=torch.int64)
step[Step.ROWS] = 50
team = Team(3, scratch_bytes=1024)
program = Program([operation(Operation.FILL, bias.data_ptr(), x.data_ptr(), 32, 1)] * 20, step)
for _ in range(3):
    team.run(program)
time.sleep({pause})
print(int(x.sum()))
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, str(50 * 32 * 60), "")
