"""How long prompts and answers are: a fixed length, or one drawn from a distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_TOKENS = 10_000_000  # of a prompt or an answer: more than any model takes


@dataclass(frozen=True)
class FixedLength:
    tokens: int

    @property
    def high(self) -> int:
        return self.tokens

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
    try:
        match text.split(":"):
            case [tokens] | ["fixed", tokens]:
                length: Length = FixedLength(int(tokens))
            case ["uniform", low, high] if 1 <= int(low) <= int(high):
                length = UniformLength(int(low), int(high))
            case ["lognormal", median, sigma, *high]:
                length = LogNormalLength(int(median), float(sigma), int(*high) if high else 8 * int(median))
            case _:
                raise ValueError(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{text!r} is no length: 128, uniform:64:256 or lognormal:128:0.5[:1024] are") from error
    if length.draw(np.random.default_rng(0)) < 1:
        raise ValueError(f"{text!r} gives lengths below 1 token; use 1 or more")
    if length.high > MAX_TOKENS:
        raise ValueError(f"{text!r} gives lengths up to {length.high:,} tokens; {MAX_TOKENS:,} are the most")
    return length
