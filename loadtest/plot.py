"""A session as one HTML page: inline SVG, no scripts, nothing to load; light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import log

from loadtest.comparison import METRICS, OUTPUT_RATE, Metric, median_of, num_failures
from loadtest.session import Scenario, Session

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 46  # room for the axes

_STYLE = """
:root { --page:#fcfcfb; --ink:#0b0b0b; --soft:#52514e; --grid:#e4e3df;
  --s0:#2a78d6; --s1:#eb6834; --s2:#1baf7a; --s3:#eda100; --s4:#e87ba4; --s5:#4a3aa7; }
@media (prefers-color-scheme: dark) { :root { --page:#1a1a19; --ink:#fff; --soft:#c3c2b7; --grid:#383835;
  --s0:#3987e5; --s1:#d95926; --s2:#199e70; --s3:#c98500; --s4:#d55181; --s5:#9085e9; } }
body { background:var(--page); color:var(--ink); font:15px/1.45 system-ui,sans-serif; margin:2rem auto;
  max-width:1120px; padding:0 1rem; }
h1 { font-size:1.3rem; } h2 { font-size:1rem; margin:0 0 .3rem; }
.panels { display:flex; flex-wrap:wrap; gap:1.5rem; } .panel { flex:1 1 480px; max-width:540px; }
svg { width:100%; height:auto; display:block; } svg text { fill:var(--soft); font-size:12px; }
.grid { stroke:var(--grid); stroke-width:1; } .line { fill:none; stroke-width:2; stroke-linejoin:round; }
.dashed { stroke-dasharray:5 4; } .dot { stroke:var(--page); stroke-width:2; }
svg .load { paint-order:stroke; stroke:var(--page); stroke-width:3px; }
.legend { color:var(--soft); margin:.2rem 0 1rem; } .legend b { display:inline-block; width:1.6em; height:.22em;
  vertical-align:middle; margin:0 .4em 0 1.2em; }
.scroll { overflow-x:auto; } table { border-collapse:collapse; font-variant-numeric:tabular-nums; margin:1rem 0; }
th,td { padding:.25rem .7rem; text-align:right; border-bottom:1px solid var(--grid); white-space:nowrap; }
th:nth-child(-n+2),td:nth-child(-n+2) { text-align:left; } .soft { color:var(--soft); }
"""


@dataclass(frozen=True)
class Point:
    """label: the load at this point. x, y in the units of the panel's axes"""

    label: str
    x: float
    y: float


@dataclass(frozen=True)
class Curve:
    """color: index of the server. A dashed curve is the same server's 99th percentile."""

    name: str
    color: int
    is_dashed: bool
    points: list[Point]


@dataclass(frozen=True)
class Panel:
    title: str
    x_title: str
    y_title: str
    curves: list[Curve]


def html_page(session: Session) -> str:
    """Latency against throughput, for every server and scenario of the session, and the figures as a table."""
    environment = session.environment
    where = (
        f"{environment.date}, commit {environment.commit}, {environment.machine}, {environment.num_cores} cores. "
        f"Medians over rounds. Solid: p50, dashed: p99. The number at a point is its load. Axes are logarithmic."
    )
    panels = "\n".join(f'<div class="panel"><h2>{escape(p.title)}</h2>{_svg(p)}</div>' for p in _panels(session))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Latency and throughput</title><style>{_STYLE}</style></head><body>"
        f'<h1>Latency and throughput</h1><p class="soft">{escape(where)}</p>{_legend(session)}'
        f'<div class="panels">{panels}</div>{_table(session)}'
        f'<p class="soft"><code>{escape(session.command)}</code>, seed {session.seed}</p></body></html>\n'
    )


def _panels(session: Session) -> list[Panel]:
    def curve_of(name: str) -> Metric:
        return next(metric for metric in METRICS if metric.name == name)

    rate = "output tokens per second"
    return [
        _panel(session, "Time between tokens", rate, "ms", [curve_of("ITL p50, ms"), curve_of("ITL p99, ms")]),
        _panel(session, "Time to first token", rate, "ms", [curve_of("TTFT p50, ms"), curve_of("TTFT p99, ms")]),
        _panel(session, "End to end", rate, "ms", [curve_of("e2e p50, ms"), curve_of("e2e p99, ms")]),
        Panel("Throughput against load", "load", "tokens per second", _throughput(session)),
    ]


def _panel(session: Session, title: str, x_title: str, y_title: str, metrics: Sequence[Metric]) -> Panel:
    curves = []
    for color, server in enumerate(session.servers):
        for metric, is_dashed in zip(metrics, (False, True), strict=True):
            points = []
            for scenario in _drawn(session):
                x = median_of(session, scenario.name, server.name, OUTPUT_RATE)
                y = median_of(session, scenario.name, server.name, metric)
                if x and y:  # a logarithmic axis has no place for zero
                    points.append(Point("" if is_dashed else _load_label(scenario), x, y))
            curves.append(Curve(f"{server.name}, {metric.name}", color, is_dashed, points))
    return Panel(title, x_title, y_title, curves)


def _throughput(session: Session) -> list[Curve]:
    curves = []
    for color, server in enumerate(session.servers):
        rates = [(s, median_of(session, s.name, server.name, OUTPUT_RATE)) for s in _drawn(session)]
        points = [Point("", float(s.concurrency or s.rate or 1), rate) for s, rate in rates if rate]
        curves.append(Curve(server.name, color, False, points))
    return curves


def _drawn(session: Session) -> list[Scenario]:
    """The scenarios that decode: answers of one token have no place on these axes."""
    return [scenario for scenario in session.scenarios if scenario.output_length != "1"]


def _load_label(scenario: Scenario) -> str:
    return str(scenario.concurrency) if scenario.rate is None else f"{scenario.rate:g}/s"


def _svg(panel: Panel) -> str:
    points = [point for curve in panel.curves for point in curve.points]
    if not points:
        return '<p class="soft">nothing was measured</p>'
    x_ticks, y_ticks = _ticks([point.x for point in points]), _ticks([point.y for point in points])

    def x_of(value: float) -> float:
        return LEFT + _share(value, x_ticks) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - _share(value, y_ticks) * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(panel, x_ticks, y_ticks, x_of, y_of)]
    parts += [_curve(curve, x_of, y_of) for curve in panel.curves]
    parts += [_labels(curve, x_of, y_of) for curve in panel.curves]  # over all curves
    label = escape(f"{panel.title}: {panel.y_title} against {panel.x_title}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axes(
    panel: Panel,
    x_ticks: list[float],
    y_ticks: list[float],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
) -> str:
    floor_y = HEIGHT - BOTTOM
    lines = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(t):.1f}" y2="{y_of(t):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y_of(t) + 4:.1f}" text-anchor="end">{t:,g}</text>'
        for t in y_ticks
    ]
    lines += [
        f'<line class="grid" x1="{x_of(t):.1f}" x2="{x_of(t):.1f}" y1="{TOP}" y2="{floor_y}"/>'
        f'<text x="{x_of(t):.1f}" y="{floor_y + 18}" text-anchor="middle">{t:,g}</text>'
        for t in x_ticks
    ]
    middle = (TOP + floor_y) / 2
    return "".join(lines) + (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(panel.x_title)}</text>'
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(panel.y_title)}</text>'
    )


def _curve(curve: Curve, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    color = f"var(--s{curve.color % 6})"
    path = " ".join(f"{x_of(p.x):.1f},{y_of(p.y):.1f}" for p in curve.points)
    dashed = " dashed" if curve.is_dashed else ""
    parts = [f'<polyline class="line{dashed}" style="stroke:{color}" points="{path}"/>']
    for p in curve.points:
        hint = escape(f"{curve.name}: {p.y:,.4g} at {p.x:,.4g}" + (f", load {p.label}" if p.label else ""))
        parts.append(
            f'<circle class="dot" style="fill:{color}" cx="{x_of(p.x):.1f}" cy="{y_of(p.y):.1f}" r="4.5">'
            f"<title>{hint}</title></circle>"
        )
    return "".join(parts)


def _labels(curve: Curve, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    return "".join(
        f'<text class="load" x="{x_of(p.x):.1f}" y="{y_of(p.y) + 18:.1f}" text-anchor="middle">{escape(p.label)}</text>'
        for p in curve.points
        if p.label
    )


def _share(value: float, ticks: Sequence[float]) -> float:
    """Where a value lies between the first tick (0) and the last (1), logarithmically: loads are doubled, not added."""
    return log(value / ticks[0]) / log(ticks[-1] / ticks[0])


def _ticks(values: Sequence[float]) -> list[float]:
    """1, 2, 5, 10, 20, ... from the last that is well below the smallest value to the first at or above the largest."""
    steps = [10.0**power * digit for power in range(-6, 9) for digit in (1, 2, 5)]
    first = max((i for i, step in enumerate(steps) if step <= 0.8 * min(values)), default=0)
    last = min((i for i, step in enumerate(steps) if step >= max(values)), default=len(steps) - 1)
    return steps[first : max(last, first + 1) + 1]


def _legend(session: Session) -> str:
    names = "".join(
        f'<b style="background:var(--s{i % 6})"></b>{escape(server.name)}' for i, server in enumerate(session.servers)
    )
    return f'<p class="legend">{names}</p>'


def _table(session: Session) -> str:
    metrics = [m for m in METRICS if any(m.read(measurement) is not None for measurement in session.measurements)]
    head = "".join(f"<th>{escape(name)}</th>" for name in ["scenario", "server", *(m.name for m in metrics), "failed"])
    rows = []
    for scenario in session.scenarios:
        for server in session.servers:
            values = [median_of(session, scenario.name, server.name, metric) for metric in metrics]
            cells = ["-" if v is None else f"{v:,.{m.digits}f}" for v, m in zip(values, metrics, strict=True)]
            cells.append(str(num_failures(session, scenario.name, server.name)))
            names = f"<td>{escape(scenario.name)}</td><td>{escape(server.name)}</td>"
            rows.append(f"<tr>{names}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
