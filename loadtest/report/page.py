"""A session as one HTML page: the curves, drawn by matplotlib as SVG inside it, and the figures. Nothing to load."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from io import StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from tabulate import tabulate

from loadtest.report.metrics import METRICS, OUTPUT_RATE, Metric, median_of, num_failures
from loadtest.report.session import Scenario, Session

_STYLE = """
body { font:15px/1.45 system-ui,sans-serif; color:#0b0b0b; margin:2rem auto; max-width:1120px; padding:0 1rem; }
h1 { font-size:1.3rem; } svg { width:100%; height:auto; } .soft { color:#52514e; } .scroll { overflow-x:auto; }
table { border-collapse:collapse; font-variant-numeric:tabular-nums; }
th,td { padding:.25rem .7rem; text-align:right; border-bottom:1px solid #e4e3df; white-space:nowrap; }
"""
_PANELS = ["ITL", "TTFT", "e2e"]  # the first word of two metrics each, over the output rate
_TITLES = ["Time between tokens", "Time to first token", "End to end", "Throughput against load"]


def html_page(session: Session) -> str:
    """Latency against throughput, for every server and scenario of the session, and the figures as a table."""
    note = f"{session.environment.line}. Medians over rounds. Solid: p50, dashed: p99. At each point stands its load."
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Latency and throughput</title>'
        f'<style>{_STYLE}</style></head><body><h1>Latency and throughput</h1><p class="soft">{escape(note)}</p>'
        f'{_picture(session)}<div class="scroll">{_table(session)}</div>'
        f'<p class="soft"><code>{escape(session.command)}</code>, seed {session.seed}</p></body></html>\n'
    )


def _picture(session: Session) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "peregrine", "font.size": 9}):
        figure = Figure(figsize=(11, 8), layout="constrained")
        panels: list[Axes] = figure.subplots(2, 2).ravel().tolist()
        for axes, title in zip(panels, _TITLES, strict=True):
            axes.set(title=title, xscale="log", yscale="log", xlabel="output tokens per second", ylabel="ms")
            axes.grid(color="#e4e3df")
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
            loads = [
                (s.concurrency or s.rate or 1, _median(session, s, server.name, OUTPUT_RATE)) for s in _drawn(session)
            ]
            _plot(panels[-1], [(x, y) for x, y in loads if y], f"C{color}-", server.name)
        panels[-1].legend(frameon=False)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


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
