"""Threads that run a program together, and the memory that they share."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.numba.program import LINE, NUM_FIELDS, Control, Operation, run

_NUM_SPINS = 3000  # turns of some 30 ns: a follower stays awake between the two programs of a step, not between steps
_MAX_OPERATIONS = 4096


def aligned_zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Zeros at the beginning of a cache line."""
    return torch.zeros(shape, dtype=dtype)


def operation(kind: Operation, *fields: int, factors: tuple[float, float] = (0.0, 0.0)) -> list[int]:
    """One operation: the integers that it takes, in the order of `program._run_unit`, and up to two floats."""
    bits = int(np.array(factors, np.float32).view(np.int64)[0])
    return [int(kind), *fields, *[0] * (NUM_FIELDS - 2 - len(fields)), bits]


class Program:
    """Operations in memory that the threads read. operations: [num_ops, NUM_FIELDS] int64; step: int64, see `Step`"""

    def __init__(self, operations: Sequence[Sequence[int]], step: Tensor, *, keeps: Sequence[Tensor] = ()) -> None:
        self.operations = torch.tensor(operations, dtype=torch.int64)
        self.step = step
        self.call = torch.tensor([self.operations.data_ptr(), len(operations), step.data_ptr()])
        self._keeps = tuple(keeps)  # whose addresses are in the operations


class Team:
    """The calling thread and `num_threads - 1` others, which sleep while there is nothing to run.

    One program at a time; only one thread may call `run`. scratch_bytes: memory that each thread has for itself.
    """

    def __init__(self, num_threads: int, *, scratch_bytes: int) -> None:
        self.num_threads = num_threads
        self._control = aligned_zeros((Control.COUNTERS + 2 * _MAX_OPERATIONS) * LINE // 8)
        self._shared = self._control.numpy()
        self._counters = self._shared[Control.COUNTERS * LINE // 8 :]
        self._call = aligned_zeros(3)
        self._scratch = [torch.zeros(scratch_bytes // 8 + 1, dtype=torch.int64) for _ in range(num_threads)]
        self._followers = [_Follower(self._control, self._call, scratch) for scratch in self._scratch[1:]]
        weakref.finalize(self, _stop, self._followers)

    def run(self, program: Program, times: Tensor | None = None) -> None:
        """Runs the program to its end. times: int64 [1 + num_ops], cycles at the start and after each operation."""
        shared, num_ops = self._shared, len(program.operations)
        assert num_ops <= _MAX_OPERATIONS, f"a program of {num_ops} operations"
        self._counters[: num_ops * 2 * LINE // 8] = 0
        self._call.copy_(program.call)
        shared[Control.OPEN * LINE // 8] = 1
        shared[Control.GENERATION * LINE // 8] += 1
        for follower in self._followers:
            follower.wake()
        address = 0 if times is None else times.data_ptr()
        run(self._call.data_ptr(), self._control.data_ptr(), self._scratch[0].data_ptr(), address, 0, 0)

    def profile(self, program: Program) -> list[tuple[str, float]]:
        """Runs the program and tells how many seconds each operation took, by name, in order."""
        num_ops = len(program.operations)
        cycles = torch.zeros(num_ops + 1, dtype=torch.int64)  # the first is that of the beginning
        self.run(program, cycles)  # wakes the others, and warms the caches as a step before would have
        before = time.perf_counter()
        self.run(program, cycles)
        total = time.perf_counter() - before
        ends = cycles[1:].numpy() - cycles[0].numpy()
        took = np.diff(ends, prepend=0) * (total / max(1, int(ends[-1])))
        names = [Operation(kind).name.lower() for kind in program.operations[:, 0].tolist()]
        return list(zip(names, took.tolist(), strict=True))


class _Follower:
    """A thread that joins programs. It watches for the next one for a while, then sleeps."""

    def __init__(self, control: Tensor, call: Tensor, scratch: Tensor) -> None:
        self._keeps = (control, call, scratch)
        self._shared = control.numpy()
        self._awake = threading.Semaphore(0)
        self._sleeps = self._stops = False
        self._thread = threading.Thread(target=self._follow, name="kernels", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Call it after the generation has changed. (Both sides hold the interpreter's lock where they look.)"""
        if self._sleeps:
            self._sleeps = False
            self._awake.release()

    def stop(self) -> None:
        self._stops = True
        self._sleeps = False
        self._awake.release()

    def _follow(self) -> None:
        control, call, scratch = (part.data_ptr() for part in self._keeps)
        seen = 0
        while not self._stops:
            seen = run(call, control, scratch, 0, seen, _NUM_SPINS)
            self._sleeps = True
            if self._shared[Control.GENERATION * LINE // 8] != seen:
                self._sleeps = False
                continue
            self._awake.acquire()


def _stop(followers: list[_Follower]) -> None:
    for follower in followers:
        follower.stop()
