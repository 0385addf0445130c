"""Medians over the rounds, and ratios to the first server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from loadtest.report.session import Measurement, Session
from loadtest.report.statistics import Distribution


@dataclass(frozen=True)
class Metric:
    name: str
    read: Callable[[Measurement], float | None]
    digits: int
    more_is_better: bool

    def text(self, value: float | None) -> str:
        return "-" if value is None else f"{value:,.{self.digits}f}"


def _p(part: Callable[[Measurement], Distribution | None], percentile: str) -> Callable[[Measurement], float | None]:
    def read(measurement: Measurement) -> float | None:
        distribution = part(measurement)
        return None if distribution is None else 1000 * float(getattr(distribution, percentile))

    return read


OUTPUT_RATE = Metric("output tok/s", lambda m: m.figures.output_tokens_per_second, 0, True)
PROMPT_RATE = Metric("prompt tok/s", lambda m: m.figures.prompt_tokens_per_second, 0, True)
TOKEN_TIME = Metric("ms per token", _p(lambda m: m.figures.time_per_output_token, "p50"), 1, False)
MEMORY = Metric("memory, GiB", lambda m: None if m.memory is None else m.memory / 2**30, 2, False)
ITL_P99 = Metric("ITL p99, ms", _p(lambda m: m.figures.inter_token_latency, "p99"), 1, False)

METRICS = [
    OUTPUT_RATE,
    PROMPT_RATE,
    TOKEN_TIME,
    Metric("TTFT p50, ms", _p(lambda m: m.figures.time_to_first_token, "p50"), 0, False),
    Metric("TTFT p99, ms", _p(lambda m: m.figures.time_to_first_token, "p99"), 0, False),
    Metric("ITL p50, ms", _p(lambda m: m.figures.inter_token_latency, "p50"), 1, False),
    ITL_P99,
    Metric("e2e p50, ms", _p(lambda m: m.figures.end_to_end, "p50"), 0, False),
    Metric("e2e p99, ms", _p(lambda m: m.figures.end_to_end, "p99"), 0, False),
    Metric("goodput, req/s", lambda m: m.figures.goodput, 2, True),
    MEMORY,
]


def median_of(session: Session, scenario: str, server: str, metric: Metric) -> float | None:
    """The median over the rounds that have the figure; None if none has."""
    values = [metric.read(measurement) for measurement in session.of(scenario, server)]
    known = [value for value in values if value is not None]
    return median(known) if known else None


def ratio(value: float | None, reference: float | None) -> float | None:
    """value / reference, where both are known and the reference is not zero."""
    return value / reference if value is not None and reference else None


def num_failures(session: Session, scenario: str, server: str) -> int:
    return sum(measurement.figures.num_failures for measurement in session.of(scenario, server))
