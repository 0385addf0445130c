"""A team of threads that runs programs, and the memory that its threads share.

The leader is the thread that calls `Team.run`, the engine's main thread; followers are daemon threads.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.numba.core.processor import LINE
from kernels.numba.program.program import NUM_FIELDS, Control, Operation, Step, open_program, run

_NUM_SPINS = 3000  # of some 30 ns: enough to stay awake between the two programs of a step, not between steps
_MAX_OPERATIONS = 4096


def operation(
    kind: Operation, *fields: int, factors: tuple[float, float] = (0.0, 0.0), rows: Step = Step.ROWS
) -> list[int]:
    """The fields of one operation: integers in the order that `program._run_unit` reads, and up to two floats.

    rows: what says how many rows it has
    """
    bits = int(np.array(factors, np.float32).view(np.int64)[0])
    return [int(kind), *fields, *[0] * (NUM_FIELDS - 3 - len(fields)), int(rows), bits]


class Program:
    """A list of operations in shared memory. operations: [num_ops, NUM_FIELDS] int64; step: int64, see `Step`"""

    def __init__(self, operations: Sequence[Sequence[int]], step: Tensor, *, keeps: Sequence[object] = ()) -> None:
        self.operations = np.array(operations, dtype=np.int64).reshape(-1, NUM_FIELDS)
        self.step = step
        self.call = np.array([self.operations.ctypes.data, len(operations), step.data_ptr()], dtype=np.int64)
        self._keeps = tuple(keeps)  # owners of the memory whose addresses are in the operations, kept alive


@dataclass(frozen=True, slots=True)
class ProgramTimes:
    """The times of one run of a program.

    cycles: readings of the processor's counter, before the first operation and after each; start, end: seconds
    """

    operations: list[Operation]
    cycles: list[int]
    start: float
    end: float


class Team:
    """The calling thread and `num_threads - 1` followers, which sleep while there is nothing to run.

    One program at a time; only one thread may call `run`. scratch_bytes: private memory of each thread.
    """

    def __init__(self, num_threads: int, *, scratch_bytes: int) -> None:
        self.num_threads, self.scratch_bytes = num_threads, scratch_bytes
        num_control = (Control.COUNTERS + 2 * _MAX_OPERATIONS) * LINE // 8
        self._control = torch.zeros(num_control, dtype=torch.int64)  # aligned by torch to a cache line
        self._counters = self._control.numpy()[Control.COUNTERS * LINE // 8 :]
        call = torch.zeros(3, dtype=torch.int64)
        self._call = call.numpy()
        self._scratch = [torch.zeros(scratch_bytes // 8 + 1, dtype=torch.int64) for _ in range(num_threads)]
        self._addresses = tuple(part.data_ptr() for part in (call, self._control, self._scratch[0]))
        self._followers = [_Follower(self._control, call, scratch) for scratch in self._scratch[1:]]
        self._timed: list[ProgramTimes] | None = None
        weakref.finalize(self, _stop, self._followers)

    def run(self, program: Program) -> None:
        """Runs the program to its end."""
        if self._timed is None:
            self._run(program, 0)
            return
        cycles = torch.zeros(1 + len(program.operations), dtype=torch.int64)
        start = time.perf_counter()
        self._run(program, cycles.data_ptr())
        end = time.perf_counter()
        operations = [Operation(kind) for kind in program.operations[:, 0].tolist()]
        self._timed.append(ProgramTimes(operations, cycles.tolist(), start, end))

    @contextlib.contextmanager
    def timing(self) -> Iterator[list[ProgramTimes]]:
        """A context within which each run of a program appends its times to the list."""
        assert self._timed is None, "one at a time"
        timed: list[ProgramTimes] = []
        self._timed = timed
        try:
            yield timed
        finally:
            self._timed = None

    def _run(self, program: Program, times: int) -> None:
        num_ops = len(program.operations)
        assert num_ops <= _MAX_OPERATIONS, f"a program of {num_ops} operations"
        self._counters[: num_ops * 2 * LINE // 8] = 0
        self._call[:] = program.call
        call, control, scratch = self._addresses
        open_program(control)
        for follower in self._followers:
            follower.wake()
        run(call, control, scratch, times, 0, 0)


class _Follower:
    """A daemon thread that joins programs. Between two, it first spins, without the interpreter's lock, then sleeps."""

    def __init__(self, control: Tensor, call: Tensor, scratch: Tensor) -> None:
        self._keeps = (control, call, scratch)
        self._shared = control.numpy()
        self._awake = threading.Semaphore(0)
        self._is_asleep = self._must_stop = False
        self._thread = threading.Thread(target=self._follow, name="kernels", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Wakes the thread if it sleeps. Call it after the generation has changed.

        No wake-up is lost: the follower sets `_is_asleep` before it reads the generation, this is called after the
        generation was written, and both hold the interpreter's lock while they read or write the flag.
        """
        if self._is_asleep:
            self._is_asleep = False
            self._awake.release()

    def stop(self) -> None:
        self._must_stop = True
        self._is_asleep = False
        self._awake.release()

    def _follow(self) -> None:
        control, call, scratch = (part.data_ptr() for part in self._keeps)
        seen = 0
        while not self._must_stop:
            seen = run(call, control, scratch, 0, seen, _NUM_SPINS)
            self._is_asleep = True
            if self._shared[Control.GENERATION * LINE // 8] != seen:
                self._is_asleep = False
                continue
            self._awake.acquire()


def _stop(followers: list[_Follower]) -> None:
    for follower in followers:
        follower.stop()
