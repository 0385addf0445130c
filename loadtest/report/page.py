"""A session as one HTML page: pictures, drawn by matplotlib as SVG inside it, and the figures. Nothing to load."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from tabulate import tabulate

from loadtest.report.drawing import GRID, draw
from loadtest.report.metrics import METRICS, OUTPUT_RATE, Metric, median_of, num_failures
from loadtest.report.search import search_html
from loadtest.report.session import Scenario, Session
from loadtest.report.timeline import timeline_picture

_STYLE = """
body { font:15px/1.45 system-ui,sans-serif; color:#0b0b0b; margin:2rem auto; max-width:1120px; padding:0 1rem; }
h1 { font-size:1.3rem; } h2 { font-size:1.05rem; } svg { width:100%; height:auto; }
.soft { color:#52514e; } .scroll { overflow-x:auto; }
table { border-collapse:collapse; font-variant-numeric:tabular-nums; }
th,td { padding:.25rem .7rem; text-align:right; border-bottom:1px solid #e4e3df; white-space:nowrap; }
"""
_PANELS = ["ITL", "TTFT", "e2e"]  # the first word of two metrics each, over the output rate
_TITLES = ["Time between tokens", "Time to first token", "End to end", "Throughput against load"]


def html_page(session: Session) -> str:
    """What a session measured: latency against throughput, or over time, or by the rate; and the figures as a table."""
    title, content = _content(session)
    note = f"{session.environment.line}. "
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<style>{_STYLE}</style></head><body><h1>{title}</h1><p class="soft">{escape(note)}'
        f'{content}<div class="scroll">{_table(session)}</div>'
        f'<p class="soft"><code>{escape(session.command)}</code>, seed {session.seed}</p></body></html>\n'
    )


def _content(session: Session) -> tuple[str, str]:
    """The title, and what stands between the note's first words and the table."""
    if session.search is not None:
        return "The highest rate within the limits", f"</p>{search_html(session.search)}"
    over_time = [run for run in session.measurements if run.samples]
    if over_time:
        pictures = [
            f"<h2>{escape(f'{run.server}, {run.scenario}')}</h2>{timeline_picture(run, session.service_level)}"
            for run in over_time
        ]
        lines = " Dotted lines: the limits." if session.service_level else ""
        return "A run over time", f"A red line: a request that failed.{lines}</p>{''.join(pictures)}"
    note = "Medians over rounds. Solid: p50, dashed: p99. At each point stands its load."
    return "Latency and throughput", f"{note}</p>{_picture(session)}"


def _picture(session: Session) -> str:
    return draw((11, 8), (2, 2), partial(_paint, session))


def _paint(session: Session, panels: list[Axes]) -> None:
    for axes, title in zip(panels, _TITLES, strict=True):
        axes.set(title=title, xscale="log", yscale="log", xlabel="output tokens per second", ylabel="ms")
        axes.grid(color=GRID)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter(NullFormatter())
    for axes, name in zip(panels, _PANELS, strict=False):
        p50, p99 = (metric for metric in METRICS if metric.name.startswith(name))
        _draw_latency(axes, session, p50, "-")
        _draw_latency(axes, session, p99, "--")
    panels[-1].set(xlabel="load", ylabel="output tokens per second")
    for color, server in enumerate(session.servers):
        loads = [(s.concurrency or s.rate or 1, _median(session, s, server.name, OUTPUT_RATE)) for s in _drawn(session)]
        _plot(panels[-1], [(x, y) for x, y in loads if y], f"C{color}-", server.name)
    panels[-1].legend(frameon=False)


def _draw_latency(axes: Axes, session: Session, metric: Metric, style: str) -> None:
    for color, server in enumerate(session.servers):
        points = []
        for scenario in _drawn(session):
            x, y = (_median(session, scenario, server.name, of) for of in (OUTPUT_RATE, metric))
            if x and y:  # a logarithmic axis has no place for zero
                points.append((x, y))
                if style == "-":
                    label = f"{scenario.concurrency}" if scenario.rate is None else f"{scenario.rate:g}/s"
                    axes.annotate(label, (x, y), xytext=(0, -11), textcoords="offset points", ha="center")
        _plot(axes, points, f"C{color}{style}", f"{server.name}, {metric.name}")


def _plot(axes: Axes, points: Sequence[tuple[float, float]], style: str, name: str) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], style, marker="o", markersize=4, label=name, gid=name)


def _median(session: Session, scenario: Scenario, server: str, metric: Metric) -> float | None:
    return median_of(session, scenario.name, server, metric)


def _drawn(session: Session) -> list[Scenario]:
    """Answers of one token have no place on these axes."""
    return [scenario for scenario in session.scenarios if scenario.decodes]


def _table(session: Session) -> str:
    metrics = [m for m in METRICS if any(m.read(measurement) is not None for measurement in session.measurements)]
    rows = [
        [
            scenario.name,
            server.name,
            *(metric.text(_median(session, scenario, server.name, metric)) for metric in metrics),
            num_failures(session, scenario.name, server.name),
        ]
        for scenario in session.scenarios
        for server in session.servers
    ]
    headers = ["scenario", "server", *(metric.name for metric in metrics), "failed"]
    return tabulate(rows, headers, tablefmt="html", disable_numparse=True)
