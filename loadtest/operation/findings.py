"""What a scenario asserted and measured: the content of its result file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loadtest.report.environment import Environment

Figure = int | float | str | bool | None | list[float] | Mapping[str, float]


@dataclass(frozen=True)
class Check:
    """One statement that has to hold. seen: with the numbers"""

    statement: str
    holds: bool
    seen: str


@dataclass
class Findings:
    """The checks of a scenario, and other figures, in the order in which they were made."""

    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)

    def check(self, statement: str, holds: bool, seen: object) -> None:
        self.checks.append(Check(statement, holds, _shown(seen)))

    def note(self, **figures: Figure) -> None:
        self.figures |= {name: _rounded(figure) for name, figure in figures.items()}

    @property
    def hold(self) -> bool:
        return all(check.holds for check in self.checks)


@dataclass(frozen=True)
class OperationResult:
    """A result file: kind tells it from others. about: the scenario in a sentence"""

    kind: str
    scenario: str
    about: str
    command: str
    environment: Environment
    options: dict[str, Figure]
    seconds: float
    checks: list[Check]
    figures: dict[str, Figure]
    error: str = ""

    @property
    def is_good(self) -> bool:
        return not self.error and bool(self.checks) and all(check.holds for check in self.checks)


def _shown(seen: object) -> str:
    return f"{seen:.4g}" if isinstance(seen, float) else str(seen)


def _rounded(figure: Figure) -> Figure:
    if isinstance(figure, float):
        return round(figure, 5)
    if isinstance(figure, list):
        return [round(value, 5) for value in figure]
    if isinstance(figure, Mapping):
        return {name: round(value, 5) for name, value in figure.items()}
    return figure
