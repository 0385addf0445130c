"""Medians over the rounds, ratios to the first server, and the markdown made of them."""

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


def markdown(session: Session) -> str:
    """The table for a README: output tokens/s (ms per token), prefill, p99 between tokens; and where it was made.

    The last column is the first server against the best of the others; above 1 the first is better.
    """
    names = [server.name for server in session.servers]
    lines = [
        _row(["", *names, f"{names[0]} against the best other"]),
        _row(["---"] * (len(names) + 2)),
        *(_markdown_row(session, scenario, _headline(scenario)) for scenario in session.scenarios),
    ]
    decoding = [scenario for scenario in session.scenarios if _headline(scenario) is OUTPUT_RATE]
    lines += [_markdown_row(session, scenario, ITL_P99) for scenario in decoding]
    if any(measurement.memory is not None for measurement in session.measurements):
        lines.append(_memory_row(session))
    return "\n".join([*lines, "", _caption(session)])


def _headline(scenario: Scenario) -> Metric:
    return PROMPT_RATE if scenario.output_length == "1" else OUTPUT_RATE


def _markdown_row(session: Session, scenario: Scenario, metric: Metric) -> str:
    values = [median_of(session, scenario.name, server.name, metric) for server in session.servers]
    cells = []
    for server, value in zip(session.servers, values, strict=True):
        per_token = median_of(session, scenario.name, server.name, TOKEN_TIME) if metric is OUTPUT_RATE else None
        failed = num_failures(session, scenario.name, server.name)
        cell = _cell(value, metric.digits) + (f" ({per_token:.1f})" if per_token is not None else "")
        cells.append(cell + (f", {failed} failed" if failed else ""))
    label = f"{scenario.name}, {metric.name}" + (" (ms per token)" if metric is OUTPUT_RATE else "")
    return _row([label, *cells, _advantage(values, metric)])


def _memory_row(session: Session) -> str:
    """The most that each server was seen to hold after any run."""
    seen: dict[str, float] = {}
    for measurement in session.measurements:
        if measurement.memory is not None:
            seen[measurement.server] = max(seen.get(measurement.server, 0.0), measurement.memory / 2**30)
    values = [seen.get(server.name) for server in session.servers]
    return _row([MEMORY.name, *(_cell(value, MEMORY.digits) for value in values), _advantage(values, MEMORY)])


def _advantage(values: list[float | None], metric: Metric) -> str:
    own, others = values[0], [value for value in values[1:] if value]
    if not own or not others:
        return "-"
    return f"{own / max(others):.2f}" if metric.more_is_better else f"{min(others) / own:.2f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _caption(session: Session) -> str:
    where = session.environment
    versions = ", ".join(f"{server.name} {server.version or 'of unknown version'}" for server in session.servers)
    return (
        f"{where.date[:10]}, commit {where.commit}, {where.machine}, {where.num_cores} cores, "
        f"{where.memory / 2**30:.0f} GiB, Python {where.python}. {versions}. Medians of alternating rounds."
    )
