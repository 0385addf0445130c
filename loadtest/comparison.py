"""Medians over the rounds, and ratios to the first server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from loadtest.session import Measurement, Scenario, Session
from loadtest.statistics import Distribution


@dataclass(frozen=True)
class Metric:
    name: str
    read: Callable[[Measurement], float | None]
    digits: int
    more_is_better: bool


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


def terminal_table(session: Session) -> str:
    """Per scenario: a row for each server, medians, and in brackets the ratio to the first server."""
    return "\n\n".join(_scenario_table(session, scenario) for scenario in session.scenarios)


def _scenario_table(session: Session, scenario: Scenario) -> str:
    first = session.servers[0].name
    metrics = [metric for metric in METRICS if median_of(session, scenario.name, first, metric) is not None]
    rows = [["", *(metric.name for metric in metrics), "failed"]]
    for server in session.servers:
        cells = []
        for metric in metrics:
            value = median_of(session, scenario.name, server.name, metric)
            reference = median_of(session, scenario.name, first, metric)
            cells.append(_cell(value, metric.digits, None if server.name == first else ratio(value, reference)))
        rows.append([server.name, *cells, str(num_failures(session, scenario.name, server.name))])
    title = (
        f"{scenario.name}: {scenario.load}, prompts of {scenario.prompt_length} tokens, "
        f"{scenario.output_length} outputs; "
        f"median of {len(session.of(scenario.name, first))} rounds (ratio to {first})"
    )
    return title + "\n" + _aligned(rows)


def _cell(value: float | None, digits: int, relative: float | None = None) -> str:
    if value is None:
        return "-"
    number = f"{value:,.{digits}f}"
    return number if relative is None else f"{number} ({relative:.2f})"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
