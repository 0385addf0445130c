"""Results as text: one run for the terminal, servers beside each other, and the tables of the documents.

All of it comes out of a session, or the result file that holds it, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from tabulate import tabulate

from loadtest.report.metrics import (
    ITL_P99,
    MEMORY,
    METRICS,
    OUTPUT_RATE,
    PROMPT_RATE,
    TOKEN_TIME,
    Metric,
    median_of,
    num_failures,
    ratio,
)
from loadtest.report.session import Measurement, Scenario, Server, Session
from loadtest.report.statistics import Distribution

START = Metric("start, s", lambda measurement: None, 1, more_is_better=False)  # of a server, not of one of its runs


def run_table(measurement: Measurement) -> str:
    """The table of all figures of one run, and of its kinds of traffic, where there are several."""
    return "\n\n".join([_whole_run(measurement), *([_kinds_table(measurement)] if measurement.kinds else [])])


def _kinds_table(measurement: Measurement) -> str:
    """A row for each kind of traffic."""
    has_goodput = any(figures.goodput is not None for figures in measurement.kinds.values())
    rows = []
    for kind, figures in measurement.kinds.items():
        first, gaps, whole = figures.time_to_first_token, figures.inter_token_latency, figures.end_to_end
        latencies = [value for of in (first, gaps, whole) for value in _median_and_p99(of)]
        goodput = [figures.goodput] if has_goodput else []
        rows.append([kind, figures.num_answers, figures.num_failures, *latencies, *goodput])
    headers = ["", "answers", "failed"]
    headers += [f"{name} {level}" for name in ("TTFT", "ITL", "e2e") for level in ("p50, ms", "p99")]
    return tabulate(rows, [*headers, *(["goodput, req/s"] if has_goodput else [])], floatfmt=".1f", missingval="-")


def _median_and_p99(values: Distribution | None) -> list[float | None]:
    return [None, None] if values is None else [1e3 * values.p50, 1e3 * values.p99]


def _whole_run(measurement: Measurement) -> str:
    figures = measurement.figures
    counted = " (counted in chunks: the server gives no usage)" if figures.num_output_tokens_are_counted else ""
    facts = [
        ("answers", f"{figures.num_answers} in {figures.duration:.2f} s, {figures.num_failures} failed"),
        *((kind, f"{n}   {measurement.failure_examples.get(kind, '')}") for kind, n in figures.errors.items()),
        ("prompt tokens", f"{figures.num_prompt_tokens} ({figures.num_cached_tokens} cached)"),
        ("output tokens", f"{figures.num_output_tokens}{counted}"),
        ("output tokens/s", f"{figures.output_tokens_per_second:.1f}"),
        ("total tokens/s", f"{figures.total_tokens_per_second:.1f}"),
        ("requests/s", f"{figures.requests_per_second:.3f}"),
    ]
    if figures.goodput is not None:
        facts.append(("goodput", f"{figures.goodput:.3f} requests/s within the service level"))
    latencies = {
        "time to first token": figures.time_to_first_token,
        "time per output token": figures.time_per_output_token,
        "inter-token latency": figures.inter_token_latency,
        "end to end": figures.end_to_end,
    }
    rows = [[name, *_milliseconds(distribution)] for name, distribution in latencies.items()]
    headers = ["milliseconds", "mean", "p50", "p90", "p99", "max"]
    return "\n".join(
        [
            f"{measurement.server}, {measurement.scenario}",
            tabulate([*facts, *_remarks(measurement)], tablefmt="plain", disable_numparse=True),
            tabulate(rows, headers, floatfmt=".2f", missingval="-"),
        ]
    )


def _milliseconds(values: Distribution | None) -> list[float | None]:
    return [] if values is None else [1e3 * v for v in (values.mean, values.p50, values.p90, values.p99, values.max)]


def _remarks(measurement: Measurement) -> list[tuple[str, str]]:
    cost = measurement.client_seconds_per_event
    events = "" if cost is None else f", {1e6 * cost:.1f} us per event with everything"
    remarks = [("this client", f"{measurement.client_load:.3f} cores{events}")]
    if measurement.memory is not None:
        remarks.append(("server memory", f"{measurement.memory / 2**30:.2f} GiB"))
    if measurement.figures.max_lateness > 0.005:
        lateness = f"{1000 * measurement.figures.max_lateness:.0f} ms"
        remarks.append(("lateness", f"the client sent up to {lateness} late (it is in the latencies)"))
    if measurement.is_disturbed:
        remarks.append(("disturbed", f"{measurement.busy_cores:.2f} cores were in use by something else"))
    return remarks


def comparison_tables(session: Session) -> str:
    """Per scenario: a row for each server, medians, and in brackets the ratio to the first server."""
    return "\n\n".join(_scenario_table(session, scenario) for scenario in session.scenarios)


def _scenario_table(session: Session, scenario: Scenario) -> str:
    first = session.servers[0].name
    metrics = [metric for metric in METRICS if median_of(session, scenario.name, first, metric) is not None]

    def cell(server: Server, metric: Metric) -> str:
        value, reference = (median_of(session, scenario.name, name, metric) for name in (server.name, first))
        relative = None if server.name == first else ratio(value, reference)
        return metric.text(value) + ("" if relative is None else f" ({relative:.2f})")

    rows = [
        [s.name, *(cell(s, metric) for metric in metrics), num_failures(session, scenario.name, s.name)]
        for s in session.servers
    ]
    headers = ["", *(metric.name for metric in metrics), "failed"]
    title = (
        f"{scenario.name}: {scenario.load}, prompts of {scenario.prompt_length} tokens, {scenario.output_length} "
        f"outputs; median of {len(session.of(scenario.name, first))} rounds (ratio to {first})\n"
    )
    return title + tabulate(rows, headers, disable_numparse=True, stralign="right", colalign=["left"])


@dataclass(frozen=True)
class Column:
    """values: for each metric, by the names of servers; the first, and a second in brackets behind it"""

    title: str
    values: dict[Metric, dict[str, float | None]]
    num_failed: dict[str, int] = field(default_factory=dict)

    def cell(self, server: str) -> str:
        first, *rest = (metric.text(values[server]) for metric, values in self.values.items())
        failed = self.num_failed.get(server, 0)
        return first + "".join(f" ({text})" for text in rest) + (f", {failed} failed" if failed else "")

    def advantage(self, ours: list[str], others: list[str]) -> str:
        """The best of ours against the best of the others; above 1, ours is faster, or smaller."""
        texts = []
        for metric, values in self.values.items():
            own, theirs = ([value for name in side if (value := values[name])] for side in (ours, others))
            if not own or not theirs:
                texts.append("-")
            elif metric.more_is_better:
                texts.append(f"{max(own) / max(theirs):.2f}")
            else:
                texts.append(f"{min(theirs) / min(own):.2f}")
        return texts[0] + "".join(f" ({text})" for text in texts[1:])


def markdown(session: Session) -> str:
    """Two tables, a row for each server: what it does and takes, and the waits between tokens under load.

    With servers on both sides there are rows of ratios between their best.
    """
    decoding = [scenario for scenario in session.scenarios if scenario.decodes]
    prefill = [scenario for scenario in session.scenarios if not scenario.decodes]
    main = [_column(session, s, f"{s.load}: output tok/s (ms per token)", OUTPUT_RATE, TOKEN_TIME) for s in decoding]
    main += [_column(session, s, f"prefill of {s.prompt_length} tokens: prompt tok/s", PROMPT_RATE) for s in prefill]
    main += _own_columns(session)
    waits = [_column(session, scenario, f"{scenario.load}: ITL p99, ms", ITL_P99) for scenario in decoding]
    tables = [_markdown_table(session, columns) for columns in (main, waits) if columns]
    return "\n\n".join([*tables, _caption(session)])


def _column(session: Session, scenario: Scenario, title: str, *metrics: Metric) -> Column:
    names = [server.name for server in session.servers]
    values = {metric: {name: median_of(session, scenario.name, name, metric) for name in names} for metric in metrics}
    return Column(title, values, {name: num_failures(session, scenario.name, name) for name in names})


def _own_columns(session: Session) -> list[Column]:
    """The columns of a server as a whole: the time of its start, and the most memory that it held after any run."""
    starts = {s.name: median(s.start_seconds) if s.start_seconds else None for s in session.servers}
    memory: dict[str, float | None] = dict.fromkeys(starts)
    for measurement in session.measurements:
        held = MEMORY.read(measurement)
        if held is not None and measurement.server in memory:
            memory[measurement.server] = max(held, memory[measurement.server] or 0.0)
    known = [(metric, values) for metric, values in ((START, starts), (MEMORY, memory)) if any(values.values())]
    return [Column(metric.name, {metric: values}) for metric, values in known]


def _markdown_table(session: Session, columns: Sequence[Column]) -> str:
    rows = []
    for server in session.servers:
        name = f"{server.name}, {server.precision}" if server.precision else server.name
        rows.append([name, *(column.cell(server.name) for column in columns)])
    for label, ours, others in _sides(session):
        rows.append([label, *(column.advantage(ours, others) for column in columns)])
    return tabulate(rows, ["", *(column.title for column in columns)], tablefmt="github", disable_numparse=True)


def _sides(session: Session) -> list[tuple[str, list[str], list[str]]]:
    """The sides to compare: all of ours with all others, then those of equal precision, if both sides have some."""
    names = session.ours or [server.name for server in session.servers[:1]]
    ours = [server for server in session.servers if server.name in names]
    others = [server for server in session.servers if server.name not in names]
    if not others:
        return []
    sides = [(f"**{ours[0].name} at its best / best of the peers**", [s.name for s in ours], [s.name for s in others])]
    for precision in dict.fromkeys(server.precision for server in ours if server.precision):
        own, theirs = ([server.name for server in side if server.precision == precision] for side in (ours, others))
        if theirs:
            sides.append((f"the same at {precision}", own, theirs))
    return sides


def _caption(session: Session) -> str:
    """The caption of the tables: machine, date, commit, and what the columns mean."""
    where = session.environment
    versions = ", ".join(f"{server.name} {server.version or 'of unknown version'}" for server in session.servers)
    known = [name for name in ("torch", "transformers") if name in where.packages]
    packages = "".join(f", {name} {where.packages[name]}" for name in known)
    parts = [
        f"{where.line}, {where.memory / 2**30:.0f} GiB, Python {where.python}{packages}.",
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
    lengths = dict.fromkeys((s.prompt_length, s.output_length) for s in session.scenarios if s.decodes)
    loads = "".join(f"Prompts of {prompt} tokens, outputs of {output}. " for prompt, output in lengths)
    num_rounds = max(len(session.of(s.name, server.name)) for s in session.scenarios for server in session.servers)
    num_disturbed = sum(measurement.is_disturbed for measurement in session.measurements)
    disturbed = f", {num_disturbed} of {len(session.measurements)} runs disturbed" if num_disturbed else ""
    return f"{loads}Medians of {num_rounds} alternating rounds{disturbed}."
