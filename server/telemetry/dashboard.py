"""The Grafana dashboard, made from the registry of metrics: a panel for each family that changes over time."""

from __future__ import annotations

import json
import sys

from pydantic import JsonValue

from server.complain import print_all
from server.telemetry.metric_families import FAMILIES, Family

_WIDTH, _HEIGHT, _PER_ROW = 8, 7, 3
_WINDOW = "$__rate_interval"
_QUANTILES = (0.5, 0.99)
_UNITS = {"seconds": "s", "bytes": "bytes", "bytes_per_second": "Bps", "ratio": "percentunit"}
_STILL = {"build_info", "ceiling_bytes_per_second", "ceiling_flops_per_second"}  # facts, not developments


def queries(family: Family) -> list[tuple[str, str]]:
    """PromQL and legend of each line: rates of counters, quantiles of histograms, gauges as they are."""
    labels = ", ".join(("model_name", *family.labels))
    legend = " ".join(f"{{{{{label}}}}}" for label in ("model_name", *family.labels))
    if family.kind == "gauge":
        return [(family.full_name, legend)]
    if family.kind == "counter":
        return [(f"sum by ({labels}) (rate({family.full_name}[{_WINDOW}]))", legend)]
    buckets = f"sum by (le, {labels}) (rate({family.full_name}_bucket[{_WINDOW}]))"
    return [(f"histogram_quantile({q}, {buckets})", f"p{100 * q:g} {legend}") for q in _QUANTILES]


def dashboard_page() -> str:
    """The file configs/monitoring/dashboard.json, which a test compares with this: a line for each panel."""
    shown = [family for family in FAMILIES if family.name not in _STILL]
    panels = ",\n".join(f"  {json.dumps(_panel(number, family))}" for number, family in enumerate(shown))
    head: dict[str, JsonValue] = {
        "uid": "peregrine",
        "title": "Peregrine",
        "schemaVersion": 41,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
    }
    return f'{json.dumps(head)[:-1]}, "panels": [\n{panels}\n]}}\n'


def _panel(number: int, family: Family) -> dict[str, JsonValue]:
    row, column = divmod(number, _PER_ROW)
    title = family.name.removesuffix("_total").replace("_", " ")
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": f"{title}, per second" if family.kind == "counter" else title,
        "description": family.help,
        "datasource": {"type": "prometheus", "uid": "prometheus"},
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": _unit(family), "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(queries(family))
        ],
    }


def _unit(family: Family) -> str:
    if family.kind == "counter":
        return "short"
    return next((unit for ending, unit in _UNITS.items() if family.name.endswith(f"_{ending}")), "short")


if __name__ == "__main__":
    sys.exit(print_all(dashboard_page()))
