"""What every job of a run is told. torch is imported where it is used: who starts and watches workers needs none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from loadtest.gpu.records import Ceilings, Record

if TYPE_CHECKING:
    import torch


class Context(msgspec.Struct, frozen=True):
    """deadline: time.time() at which the section is stopped; tables: where tile shapes are written"""

    is_rehearsal: bool
    seed: int
    deadline: float
    ceilings: Ceilings | None
    tables: str

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.is_rehearsal else "cuda")

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def generator(self, job: str) -> torch.Generator:
        """A random generator that gives the same numbers for the same run and job, in whichever process."""
        import torch

        number = int.from_bytes(job.encode(), "big") % 1_000_003
        return torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + number)

    def floor(self, *, num_bytes: float, num_flops: float = 0.0) -> float | None:
        return None if self.ceilings is None else self.ceilings.floor(num_bytes=num_bytes, num_flops=num_flops)


@dataclass(frozen=True)
class Job:
    """Records come as they are found, so that what was measured before a failure stays."""

    name: str
    run: Callable[[], Iterator[Record]]
