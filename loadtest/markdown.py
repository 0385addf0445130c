"""The README's tables, out of a result file and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from loadtest.comparison import ITL_P99, MEMORY, OUTPUT_RATE, PROMPT_RATE, TOKEN_TIME, Metric, median_of, num_failures
from loadtest.session import Scenario, Server, Session

START = Metric("start, s", lambda measurement: None, 1, more_is_better=False)  # of a server, not of one of its runs


@dataclass(frozen=True)
class Figure:
    """One number for each server. read: None where it was not measured"""

    metric: Metric
    read: Callable[[Server], float | None]


@dataclass(frozen=True)
class Column:
    """The first figure, and a second in brackets behind it. num_failed: requests that failed in it"""

    title: str
    figures: Sequence[Figure]
    num_failed: Callable[[Server], int] = lambda server: 0


def markdown(session: Session) -> str:
    """Two tables, a row for each server: what it does and takes, and the waits between tokens under load.

    With servers on both sides there are rows of ratios: the best of ours against the best of the others. All ratios
    are the right way round: above 1, ours is faster, or smaller.
    """
    decoding = [scenario for scenario in session.scenarios if scenario.output_length != "1"]
    prefill = [scenario for scenario in session.scenarios if scenario.output_length == "1"]
    main = [_output_column(session, scenario) for scenario in decoding]
    main += [_prefill_column(session, scenario) for scenario in prefill]
    main += [column for column in (_start_column(), _memory_column(session)) if _is_known(session, column)]
    waits = [_column(session, scenario, f"{scenario.load}: ITL p99, ms", ITL_P99) for scenario in decoding]
    tables = [_table(session, columns) for columns in (main, waits) if columns]
    return "\n\n".join([*tables, _caption(session)])


def _output_column(session: Session, scenario: Scenario) -> Column:
    return _column(session, scenario, f"{scenario.load}: output tok/s (ms per token)", OUTPUT_RATE, TOKEN_TIME)


def _prefill_column(session: Session, scenario: Scenario) -> Column:
    return _column(session, scenario, f"prefill of {scenario.prompt_length} tokens: prompt tok/s", PROMPT_RATE)


def _column(session: Session, scenario: Scenario, title: str, *metrics: Metric) -> Column:
    def figure(metric: Metric) -> Figure:
        return Figure(metric, lambda server: median_of(session, scenario.name, server.name, metric))

    return Column(
        title, [figure(metric) for metric in metrics], lambda server: num_failures(session, scenario.name, server.name)
    )


def _start_column() -> Column:
    return Column(
        START.name, [Figure(START, lambda server: median(server.start_seconds) if server.start_seconds else None)]
    )


def _memory_column(session: Session) -> Column:
    """The most that a server was seen to hold after any run."""

    def read(server: Server) -> float | None:
        own = [MEMORY.read(measurement) for measurement in session.measurements if measurement.server == server.name]
        return max((value for value in own if value is not None), default=None)

    return Column(MEMORY.name, [Figure(MEMORY, read)])


def _is_known(session: Session, column: Column) -> bool:
    return any(figure.read(server) is not None for figure in column.figures for server in session.servers)


def _table(session: Session, columns: Sequence[Column]) -> str:
    lines = [_row(["", *(column.title for column in columns)]), _row(["---"] * (len(columns) + 1))]
    for server in session.servers:
        name = f"{server.name}, {server.precision}" if server.precision else server.name
        lines.append(_row([name, *(_cell(column, server) for column in columns)]))
    for label, ours, others in _sides(session):
        lines.append(_row([label, *(_ratio_cell(column, ours, others) for column in columns)]))
    return "\n".join(lines)


def _sides(session: Session) -> list[tuple[str, list[Server], list[Server]]]:
    """What is compared: all of ours with all others, and those of equal precision where both sides have it."""
    names = session.ours or [server.name for server in session.servers[:1]]
    ours = [server for server in session.servers if server.name in names]
    others = [server for server in session.servers if server.name not in names]
    if not others:
        return []
    title = ours[0].name
    sides = [(f"**{title} at its best / best of the peers**", ours, others)]
    for precision in dict.fromkeys(server.precision for server in ours if server.precision):
        same = [[server for server in side if server.precision == precision] for side in (ours, others)]
        if same[1]:
            sides.append((f"the same at {precision}", same[0], same[1]))
    return sides


def _cell(column: Column, server: Server) -> str:
    values = [(figure.read(server), figure.metric.digits) for figure in column.figures]
    first, *rest = ("-" if value is None else f"{value:,.{digits}f}" for value, digits in values)
    failed = column.num_failed(server)
    return first + "".join(f" ({text})" for text in rest) + (f", {failed} failed" if failed else "")


def _ratio_cell(column: Column, ours: Sequence[Server], others: Sequence[Server]) -> str:
    first, *rest = (_advantage(figure, ours, others) for figure in column.figures)
    return first + "".join(f" ({text})" for text in rest)


def _advantage(figure: Figure, ours: Sequence[Server], others: Sequence[Server]) -> str:
    own, theirs = ([value for server in side if (value := figure.read(server))] for side in (ours, others))
    if not own or not theirs:
        return "-"
    return f"{max(own) / max(theirs):.2f}" if figure.metric.more_is_better else f"{min(theirs) / min(own):.2f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _caption(session: Session) -> str:
    """Where, when, with what, and what the words mean."""
    where = session.environment
    cores = f"{where.num_cores} cores" + (f" ({', '.join(where.features)})" if where.features else "")
    versions = ", ".join(f"{server.name} {server.version or 'of unknown version'}" for server in session.servers)
    known = [name for name in ("torch", "transformers") if name in where.packages]
    packages = "".join(f", {name} {where.packages[name]}" for name in known)
    parts = [
        f"{where.date[:10]}, commit {where.commit}, {where.machine}, {cores}, {where.memory / 2**30:.0f} GiB, "
        f"Python {where.python}{packages}.",
        f"Servers: {versions}.",
        _loads(session),
    ]
    if any(server.start_seconds for server in session.servers):
        parts.append("Start: from the command to the end of the first answer, files in the page cache.")
    if any(measurement.memory is not None for measurement in session.measurements):
        parts.append("Memory: of all processes of a server after a run, shared pages once; the most seen.")
    if len(session.servers) > 1:
        parts.append("Ratios above 1: ours is faster, or smaller.")
    return " ".join(parts)


def _loads(session: Session) -> str:
    decoding = [scenario for scenario in session.scenarios if scenario.output_length != "1"]
    lengths = dict.fromkeys((scenario.prompt_length, scenario.output_length) for scenario in decoding)
    loads = "".join(f"Prompts of {prompt} tokens, outputs of {output}. " for prompt, output in lengths)
    num_rounds = max(len(session.of(s.name, server.name)) for s in session.scenarios for server in session.servers)
    num_disturbed = sum(measurement.is_disturbed for measurement in session.measurements)
    disturbed = f", {num_disturbed} of {len(session.measurements)} runs disturbed" if num_disturbed else ""
    return f"{loads}Medians of {num_rounds} alternating rounds{disturbed}."
