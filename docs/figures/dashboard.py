"""A picture of the dashboard's open row, drawn with matplotlib out of a Prometheus that scrapes servers.

python docs/figures/dashboard.py http://127.0.0.1:9090 [MINUTES] [ROW]     # writes dashboard.png beside it

It asks what Grafana would ask, panel by panel (`server.monitoring`), and lays the answers out as Grafana does.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import httpx
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator

from server.monitoring.dashboard_rows import ROWS
from server.monitoring.panels import COLORS, COLUMNS, Panel, places, total_height

HERE = Path(__file__).parent
STEP = 2.0  # seconds between points
WINDOW = "20s"
INK, GRID = "#2b2b29", "#e4e3df"
PAINT = {"green": "#1a7f37", "yellow": "#b58900", "red": "#b42318"}
CYCLE = ["#2a78d6", "#eb6834", "#1baf7a", "#4a3aa7", "#eda100", "#e87ba4", "#8a8985", "#7fb2ec", "#b42318"]
Series = tuple[dict[str, str], np.ndarray, np.ndarray]


def ask(url: str, expression: str, minutes: float) -> list[Series]:
    filled = expression.replace("$__rate_interval", WINDOW).replace("$model", ".*").replace("$instance", ".*")
    end = time.time()
    params = {"query": filled, "start": end - 60 * minutes, "end": end, "step": STEP}
    answer = httpx.get(f"{url}/api/v1/query_range", params=params, timeout=60).json()
    assert answer["status"] == "success", f"{filled}: {answer}"
    found = []
    for series in answer["data"]["result"]:
        points = np.array([(float(at), float(value)) for at, value in series["values"]])
        found.append((series["metric"], points[:, 0] - end, points[:, 1]))
    return found


def shown(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}{'' if letter == 'k' else unit}"
    if value >= 1000:
        return f"{value:,.0f}"
    short = {"reqps": " req/s", "tokens/s": " tok/s"}.get(unit, "")
    return f"{value:.3g}{short}"


def legend_of(template: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template or ", ".join(labels.values())


def draw_stat(axes: Axes, panel: Panel, answers: list[list[Series]]) -> None:
    axes.set_axis_off()
    series = [each for answer in answers for each in answer]
    if not series:
        axes.text(0.5, 0.4, "nothing yet", ha="center", va="center", color=INK)
        return
    _, times, values = series[0]
    last, color = values[-1], INK
    if panel.thresholds:
        steps = list(zip(COLORS[::-1] if panel.is_more_better else COLORS, (-np.inf, *panel.thresholds), strict=True))
        color = PAINT[[name for name, bound in steps if last >= bound][-1]]
    axes.fill_between(times, values / max(values.max(), 1e-9), color=color, alpha=0.12, linewidth=0)
    axes.set_ylim(0, 2.5)
    axes.text(0.5, 0.62, shown(last, panel.unit), ha="center", va="center", color=color, fontsize=15, fontweight="bold",
              transform=axes.transAxes)  # fmt: skip


def draw_lines(axes: Axes, panel: Panel, answers: list[list[Series]]) -> None:
    asked = zip(panel.queries, answers, strict=True)
    lines = [
        (legend_of(query.legend, labels), times, values) for query, answer in asked for labels, times, values in answer
    ]
    lines = [line for line in lines if line[2].any()] or lines[:1]
    lines.sort(key=lambda line: line[0])
    if panel.is_stacked and lines:
        grid = np.unique(np.concatenate([times for _, times, _ in lines]))
        stack = [np.interp(grid, times, values, left=0, right=0) for _, times, values in lines]
        axes.stackplot(grid, stack, labels=[name for name, _, _ in lines], colors=CYCLE, alpha=0.6)
    else:
        for (name, times, values), color in zip(lines, CYCLE * 3, strict=False):
            axes.plot(times, values, label=name, color=color, linewidth=1)
    axes.set_ylim(0, 1 if panel.maximum else None)
    axes.legend(loc="upper left", fontsize=6, frameon=False, ncols=3)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, panel.unit) if value else "0"))


def draw_heatmap(axes: Axes, panel: Panel, answers: list[list[Series]]) -> None:
    series = sorted((each for each in answers[0] if each[0]["le"] != "+Inf"), key=lambda each: float(each[0]["le"]))
    bounds = np.array([float(labels["le"]) for labels, _, _ in series])
    counts = np.diff(np.stack([values for _, _, values in series]), axis=0, prepend=0.0).clip(min=0)
    busy = np.flatnonzero(counts.sum(axis=1) > 0)
    low, high = max(busy[0] - 1, 0), min(busy[-1] + 1, len(bounds) - 1)
    edges = np.concatenate([[bounds[low] / 1.3], bounds[low : high + 1]])
    times = series[0][1]
    grid = np.concatenate([times - STEP / 2, times[-1:] + STEP / 2])
    axes.pcolormesh(grid, edges, counts[low : high + 1], cmap="Oranges", norm=PowerNorm(0.5))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, "s")))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def draw(url: str, minutes: float, row_title: str) -> None:
    matplotlib.rcParams.update({"font.size": 7, "font.family": "sans-serif", "text.color": INK, "axes.edgecolor": GRID})
    row = next(row for row in ROWS if row.title.startswith(row_title))
    height = total_height(row.panels)
    figure = plt.figure(figsize=(13, height * 0.32), facecolor="#f6f7f9")
    for panel, (x, y) in zip(row.panels, places(row.panels, 0), strict=True):
        left, width = x / COLUMNS + 0.035, panel.width / COLUMNS - 0.045
        if panel.kind == "stat":
            left, width = x / COLUMNS + 0.008, panel.width / COLUMNS - 0.014
        bottom = 1 - (y + panel.height) / height + 0.35 / height
        axes = figure.add_axes((left, bottom + 0.6 / height, width, (panel.height - 2.2) / height), facecolor="white")
        axes.set_title(panel.title, fontsize=8, loc="left", color=INK)
        answers = [ask(url, query.expression, minutes) for query in panel.queries]
        {"stat": draw_stat, "heatmap": draw_heatmap}.get(panel.kind, draw_lines)(axes, panel, answers)
        if panel.kind != "stat":
            axes.grid(color=GRID, linewidth=0.5)
            axes.tick_params(length=0, labelsize=6)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 60:.1f} min" if value else "now"))
            axes.set_xlim(-60 * minutes, 0)
            axes.set_xticks(np.linspace(-60 * minutes, 0, 4))
    figure.savefig(HERE / "dashboard.png", dpi=110)


if __name__ == "__main__":
    address, minutes, title = [*sys.argv[1:], *("", "3", "Overview")[len(sys.argv) - 1 :]]
    draw(address, float(minutes), title)
