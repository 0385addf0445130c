"""What each operation of a forward pass takes, from whoever can tell, and what kind of work it is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from kernels.numba.program.team import ProgramTimes, Team


@dataclass(frozen=True)
class OperationTime:
    """seconds: of one forward pass, all calls of that name together"""

    name: str
    seconds: float


class OperationClock(Protocol):
    """One for each way in which a model runs: for torch's operations one by one, for programs of fused ones."""

    def profile(self, forward: Callable[[], object], num_calls: int) -> Iterable[tuple[str, float]]:
        """Calls `forward` so often. (name, seconds per call) of its operations; a name may come more than once."""
        ...


class TorchClock:
    """Torch's own profiler: the time in an operation and not in those that it calls, its dispatch included."""

    def profile(self, forward: Callable[[], object], num_calls: int) -> list[tuple[str, float]]:
        with torch.autograd.profiler.profile() as profiler:
            for _ in range(num_calls):
                forward()
        return [(event.key, 1e-6 * event.self_cpu_time_total / num_calls) for event in profiler.key_averages()]


class TeamClock:
    """For programs of compiled operations, which a team of threads runs: from the end of one to the end of the next.

    Of the calls, the one that takes the median time counts.
    """

    def __init__(self, team: Team) -> None:
        self._team = team

    def profile(self, forward: Callable[[], object], num_calls: int) -> list[tuple[str, float]]:
        calls: list[list[ProgramTimes]] = []
        for _ in range(num_calls):
            with self._team.timing() as programs:
                forward()
            calls.append(programs)
        first, last = calls[0][0], calls[-1][-1]
        seconds_per_cycle = (last.end - first.end) / (last.cycles[-1] - first.cycles[-1])
        calls.sort(key=lambda programs: sum(program.end - program.start for program in programs))
        return [
            (operation.name.lower(), (after - before) * seconds_per_cycle)
            for program in calls[num_calls // 2]
            for operation, (before, after) in zip(program.operations, pairwise(program.cycles), strict=True)
        ]


# In this order; what no pattern matches is "norms and other". Operations that only make views or memory do no
# arithmetic: what they take is dispatch.
WEIGHTS, ATTENTION, OTHER = "weights", "attention", "norms and other"
_KINDS = [
    (
        None,
        r"view|reshape|slice|select$|transpose|as_strided|expand|permute|unsqueeze|squeeze|split|unbind|detach|alias"
        r"|::empty|::resize|::t$|::linear$|::matmul$|profiler|lift_fresh|_to_copy$|::to$|::contiguous$",
    ),
    (
        ATTENTION,
        r"bmm|baddbmm|softmax|scaled_dot|flash|attend|index_select|index_put|index_copy|store",
    ),
    (WEIGHTS, r"addmm|::mm$|fbgemm|_linear|linear_|mkldnn|onednn|int\dpack|gemm|^multiply|^quantise|^round$"),
]


def by_kind(operations: Iterable[OperationTime]) -> dict[str, float]:
    """Seconds of arithmetic in each of WEIGHTS, ATTENTION and OTHER."""
    seconds = {WEIGHTS: 0.0, ATTENTION: 0.0, OTHER: 0.0}
    for operation in operations:
        kind = kind_of(operation.name)
        if kind is not None:
            seconds[kind] += operation.seconds
    return seconds


def kind_of(name: str) -> str | None:
    """Which work an operation of that name does; None if it does no arithmetic."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name.lower())), OTHER)


def merged(times: Iterable[tuple[str, float]]) -> list[OperationTime]:
    """One for each name, the longest first."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for name, duration in times:
        seconds[name] += duration
    return sorted((OperationTime(name, total) for name, total in seconds.items()), key=lambda o: -o.seconds)
