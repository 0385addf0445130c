"""The panels of a Grafana dashboard: what each shows and in which unit, and their JSON (schema version 41)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

Json = dict[str, JsonValue]
Kind = Literal["stat", "timeseries", "heatmap", "bargauge"]
Unit = Literal["short", "s", "percentunit", "reqps", "tokens/s", "Bps", "FLOP/s", "bytes", "tokens", "none"]

DATA_SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24  # of Grafana's grid
_HEIGHTS: dict[Kind, int] = {"stat": 4, "timeseries": 8, "heatmap": 8, "bargauge": 8}
_GRAFANA_UNITS = {"tokens/s": "suffix: tokens/s", "FLOP/s": "suffix:FLOP/s", "tokens": "suffix: tokens"}
COLORS = ("green", "yellow", "red")


@dataclass(frozen=True, slots=True)
class Query:
    """An expression of PromQL, and what Grafana calls its series: labels in double braces."""

    expression: str
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """thresholds: from which value on it is yellow, and red; low ones where less is worse (`is_more_better`)."""

    title: str
    description: str
    queries: Sequence[Query]
    kind: Kind = "timeseries"
    unit: Unit = "short"
    width: int = 8
    thresholds: tuple[float, float] | None = None
    is_more_better: bool = False
    is_stacked: bool = False

    @property
    def height(self) -> int:
        return _HEIGHTS[self.kind]

    @property
    def maximum(self) -> float | None:
        """What no value can be above."""
        return 1.0 if self.unit == "percentunit" else None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels below a heading. One that is closed asks nothing until it is opened."""

    title: str
    panels: Sequence[Panel]
    is_open: bool = False


def row_json(rows: Sequence[Row]) -> list[JsonValue]:
    """All rows with their panels, laid out from left to right and top to bottom."""
    drawn: list[JsonValue] = []
    top, number = 0, 0
    for row in rows:
        number += 1
        heading: Json = {
            "id": number, "type": "row", "title": row.title, "collapsed": not row.is_open,
            "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
        }  # fmt: skip
        top += 1
        panels: list[JsonValue] = []
        for panel, (x, y) in zip(row.panels, places(row.panels, top), strict=True):
            number += 1
            panels.append(panel_json(panel, number, x, y))
        top += total_height(row.panels)
        heading["panels"] = [] if row.is_open else panels
        drawn += [heading, *(panels if row.is_open else [])]
    return drawn


def places(panels: Sequence[Panel], top: int) -> list[tuple[int, int]]:
    """Column and line of each, from left to right, a new line where one does not fit."""
    found, x, y, line = [], 0, top, 0
    for panel in panels:
        if x + panel.width > COLUMNS:
            x, y, line = 0, y + line, 0
        found.append((x, y))
        x, line = x + panel.width, max(line, panel.height)
    return found


def total_height(panels: Sequence[Panel]) -> int:
    """Lines that they take."""
    return max((y + panel.height for panel, (_, y) in zip(panels, places(panels, 0), strict=True)), default=0)


def panel_json(panel: Panel, number: int, x: int, y: int) -> Json:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATA_SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
        "targets": [_target(panel, query, index) for index, query in enumerate(panel.queries)],
    }


def _target(panel: Panel, query: Query, index: int) -> Json:
    target: Json = {
        "refId": chr(ord("A") + index), "datasource": DATA_SOURCE, "expr": query.expression,
        "legendFormat": "{{le}}" if panel.kind == "heatmap" else query.legend or "__auto",
    }  # fmt: skip
    if panel.kind == "heatmap":
        target["format"] = "heatmap"
    if panel.kind in ("stat", "bargauge"):
        target["instant"] = panel.kind == "bargauge"
    return target


def _defaults(panel: Panel) -> Json:
    defaults: Json = {
        "unit": _GRAFANA_UNITS.get(panel.unit, panel.unit), "min": 0, "noValue": "nothing yet",
        "color": {"mode": "thresholds" if panel.kind in ("stat", "bargauge") else "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": _steps(panel)},
    }  # fmt: skip
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "lineWidth": 1, "fillOpacity": 25 if panel.is_stacked else 5, "showPoints": "never", "spanNulls": False,
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if panel.thresholds else "off"},
        }  # fmt: skip
    return defaults


def _steps(panel: Panel) -> list[JsonValue]:
    colors = COLORS[::-1] if panel.is_more_better else COLORS
    if panel.thresholds is None:
        return [{"color": "blue" if panel.kind == "bargauge" else "text", "value": None}]
    return [{"color": color, "value": value} for color, value in zip(colors, (None, *panel.thresholds), strict=True)]


def _options(panel: Panel) -> Json:
    if panel.kind == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "graphMode": "area",
            "colorMode": "value", "textMode": "auto", "justifyMode": "auto",
        }  # fmt: skip
    if panel.kind == "bargauge":
        reduce: Json = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        return {"reduceOptions": reduce, "orientation": "horizontal", "displayMode": "basic"}
    if panel.kind == "heatmap":
        return {
            "calculate": False, "cellGap": 1, "yAxis": {"unit": panel.unit},
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5, "fill": "dark-orange"},
            "tooltip": {"mode": "single", "yHistogram": True}, "legend": {"show": True},
        }  # fmt: skip
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
