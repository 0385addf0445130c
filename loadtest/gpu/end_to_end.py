"""The cases that whole models are measured on, and the floors of their steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loadtest.gpu.context import Context
from loadtest.gpu.shapes import Load
from loadtest.micro.shapes import Shape

TOKENS_PER_STEP = 8192  # of a prompt, or of several
_SLOWEST = 3.0  # times the floor: a case that would not fit into the time at this pace is left out


@dataclass(frozen=True)
class Case:
    """A batch of prompts, of equal length in tokens."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}"


def decode_floor(context: Context, shape: Shape, case: Case, mean_outputs: float) -> float | None:
    """The floor, in seconds, of a decoding step of the whole batch, with so many tokens behind each prompt."""
    length = case.length + int(mean_outputs)
    return context.floor(
        num_bytes=shape.decode_bytes(case.batch, length), num_flops=shape.decode_flops(case.batch, length)
    )


def prefill_floor(context: Context, shape: Shape, case: Case) -> float | None:
    return context.floor(num_bytes=shape.decode_bytes(0, 0), num_flops=case.batch * shape.prefill_flops(case.length))


def num_prefill_steps(case: Case) -> int:
    """Steps until all prompts are computed. In them the first sequences decode already: these outputs are not timed."""
    return 2 + -(-case.batch * case.length // TOKENS_PER_STEP)


def cases_of(load: Load) -> list[Case]:
    """The cases of a load, from the quickest to the slowest."""
    cases = [Case(batch, length) for batch in load.batches for length in load.contexts]
    return sorted(cases, key=lambda case: case.batch * case.length)


@dataclass(frozen=True)
class Allowance:
    """The time that a job may use. overhead: seconds that a case of it takes beside its steps"""

    context: Context
    reserve: float  # seconds that must be left for the jobs after it
    overhead: float

    def has_room_for(self, shape: Shape, case: Case, num_outputs: int) -> bool:
        return self.context.seconds_left - self.reserve > self.overhead + _pessimistic(
            self.context, shape, case, num_outputs
        )


def allow(context: Context, *, num_jobs_left: int, overhead: float) -> Allowance:
    """An equal share of what is left, for the first of so many jobs."""
    return Allowance(context, context.seconds_left * (1 - 1 / num_jobs_left), overhead)


def _pessimistic(context: Context, shape: Shape, case: Case, num_outputs: int) -> float:
    """Seconds that a case should never exceed."""
    prefill = prefill_floor(context, shape, case) or 0.0
    decode = decode_floor(context, shape, case, num_outputs) or 0.0
    return _SLOWEST * (prefill + (num_outputs + num_prefill_steps(case)) * decode)


def random_prompts(context: Context, shape: Shape, case: Case) -> list[list[int]]:
    """Random prompts, all different, so that no prefix is shared."""
    generator = np.random.default_rng([context.seed, case.batch, case.length])
    prompts: list[list[int]] = generator.integers(0, shape.vocab_size, (case.batch, case.length)).tolist()
    return prompts
