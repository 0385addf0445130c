"""How long prompts and answers are: a fixed length, or one drawn from a distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FixedLength:
    tokens: int

    def draw(self, random: np.random.Generator) -> int:
        return self.tokens

    def __str__(self) -> str:
        return str(self.tokens)


@dataclass(frozen=True)
class UniformLength:
    """Every length from `low` to `high` (both included) equally often."""

    low: int
    high: int

    def draw(self, random: np.random.Generator) -> int:
        return int(random.integers(self.low, self.high + 1))

    def __str__(self) -> str:
        return f"uniform:{self.low}:{self.high}"


@dataclass(frozen=True)
class LogNormalLength:
    """exp(N(ln median, sigma)), rounded, cut to 1..high: half of the lengths are below the median, a few far above."""

    median: int
    sigma: float
    high: int

    def draw(self, random: np.random.Generator) -> int:
        return min(max(round(self.median * float(np.exp(self.sigma * random.standard_normal()))), 1), self.high)

    def __str__(self) -> str:
        return f"lognormal:{self.median}:{self.sigma:g}:{self.high}"


Length = FixedLength | UniformLength | LogNormalLength


def parse_length(text: str) -> Length:
    """`128`, `fixed:128`, `uniform:LOW:HIGH` or `lognormal:MEDIAN:SIGMA[:HIGH]`, in tokens. HIGH defaults to 8 medians.

    Raises ValueError with the forms that are understood.
    """
    shape, _, rest = text.partition(":") if ":" in text else ("fixed", ":", text)
    parser = _PARSERS.get(shape)
    try:
        if parser is None:
            raise ValueError(shape)
        length = parser(rest.split(":"))
    except (ValueError, IndexError) as error:
        raise ValueError(f"{text!r} is no length: 128, uniform:64:256 or lognormal:128:0.5[:1024] are") from error
    if length.draw(np.random.default_rng(0)) < 1:
        raise ValueError(f"{text!r} gives lengths below 1 token; use 1 or more")
    return length


def _fixed(fields: list[str]) -> FixedLength:
    (tokens,) = fields
    return FixedLength(int(tokens))


def _uniform(fields: list[str]) -> UniformLength:
    low, high = (int(field) for field in fields)
    if not 1 <= low <= high:
        raise ValueError(f"{low}..{high} is empty")
    return UniformLength(low, high)


def _log_normal(fields: list[str]) -> LogNormalLength:
    median, sigma = int(fields[0]), float(fields[1])
    return LogNormalLength(median, sigma, int(fields[2]) if len(fields) > 2 else 8 * median)


_PARSERS: dict[str, Callable[[list[str]], Length]] = {"fixed": _fixed, "uniform": _uniform, "lognormal": _log_normal}
