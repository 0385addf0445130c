"""What a section finds out, one record at a time, and the file in which all of it is kept."""

from __future__ import annotations

from pathlib import Path

import msgspec

from loadtest.report.environment import Environment
from loadtest.report.result_files import load_result


class Ceilings(msgspec.Struct, frozen=True, tag=True):
    """What this chip reaches on the two simplest loads: a large copy (bytes read and written), a bfloat16 product."""

    bytes_per_second: float
    flops_per_second: float
    l2_bytes: int

    def floor(self, *, num_bytes: float, num_flops: float = 0.0) -> float:
        """Seconds below which nothing that moves and computes so much can fall."""
        return max(num_bytes / self.bytes_per_second, num_flops / self.flops_per_second)


class Begun(msgspec.Struct, frozen=True, tag=True):
    """A job of the section has started: should the process die, the next one goes on after it."""

    job: str


class Check(msgspec.Struct, frozen=True, tag=True):
    """A kernel against its definition. NaN is an error above every bound.

    error: |found - expected| / |expected| in float64, or the number of differing tokens where bits are compared
    """

    name: str
    error: float
    bound: float

    @property
    def is_ok(self) -> bool:
        return self.error <= self.bound


class Timing(msgspec.Struct, frozen=True, tag=True):
    """A median time and what it has to be compared with. All in seconds.

    peers: of others doing the same in the same run, in turns; num_tokens: that come out of it, for a rate
    """

    name: str
    seconds: float
    floor: float | None = None
    peers: dict[str, float] = {}
    num_tokens: int | None = None
    note: str = ""

    @property
    def fraction(self) -> float | None:
        """The floor divided by the time: 1.0 is the most that is possible."""
        return None if self.floor is None or not self.seconds else self.floor / self.seconds


class Tuned(msgspec.Struct, frozen=True, tag=True):
    """The fastest tile shape of a kernel. Seconds per call, the geometric mean over its cases.

    table: the file that it was written to, in the folder of the tables
    """

    kernel: str
    key: str
    config: dict[str, int]
    before: float
    after: float
    num_tried: int
    table: str


class Problem(msgspec.Struct, frozen=True, tag=True):
    """Something that was not measured, and why."""

    job: str
    text: str


Record = Ceilings | Begun | Check | Timing | Tuned | Problem


class SectionResult(msgspec.Struct, frozen=True):
    name: str
    seconds: float
    records: list[Record]


class Session(msgspec.Struct, frozen=True):
    """One run of the command. seed: of the random inputs, drawn anew for each run"""

    command: str
    is_rehearsal: bool
    seed: int
    device: str
    environment: Environment
    packages: dict[str, str]
    sections: list[SectionResult]

    @property
    def records(self) -> list[Record]:
        return [record for section in self.sections for record in section.records]

    @property
    def timings(self) -> dict[str, Timing]:
        return {record.name: record for record in self.records if isinstance(record, Timing)}


def load(path: Path) -> Session:
    """Raises ValueError if the file is none of these."""
    return load_result(path, Session, origin="python -m loadtest.gpu")
