"""The Grafana dashboard: its variables and annotations around the rows of `dashboard_rows`.

Made by: python -m server.monitoring.dashboard > configs/monitoring/dashboard.json
"""

from __future__ import annotations

import json
import sys

from pydantic import JsonValue

from server.complain import print_all
from server.monitoring.dashboard_rows import ROWS, SCOPE
from server.monitoring.panels import DATA_SOURCE, Json, row_json
from server.telemetry import metric_families as families

DEATHS = f"{SCOPE.increase(families.ENGINE_DEATHS, by=('instance',))} > 0"


def dashboard() -> Json:
    return {
        "uid": "peregrine",
        "title": "Peregrine",
        "description": "An OpenAI-compatible inference server. Made by: python -m server.monitoring.dashboard",
        "tags": ["peregrine", "inference"],
        "schemaVersion": 41,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [_source_variable(), _variable("model", "model_name"), _variable("instance", "instance")]
        },
        "annotations": {"list": [_deaths()]},
        "panels": row_json(ROWS),
    }


def _source_variable() -> Json:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0}


def _variable(name: str, label: str) -> Json:
    scope = '{model_name=~"$model"}' if name != "model" else ""
    return {
        "name": name, "label": name.capitalize(), "type": "query", "datasource": DATA_SOURCE,
        "query": {"query": f"label_values({families.READY.full_name}{scope}, {label})", "refId": name},
        "refresh": 2, "sort": 1, "multi": True, "includeAll": True, "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def _deaths() -> Json:
    return {
        "name": "Engine deaths", "datasource": DATA_SOURCE, "enable": True, "iconColor": "red", "expr": DEATHS,
        "titleFormat": "the engine of {{instance}} died", "step": "30s",
    }  # fmt: skip


def dashboard_page() -> str:
    """The file configs/monitoring/dashboard.json, which a test compares with this: a line for each panel."""
    whole = dashboard()
    rows = whole.pop("panels")
    assert isinstance(rows, list)
    lines = ",\n".join(_lines(row) for row in rows)
    return f'{json.dumps(whole)[:-1]}, "panels": [\n{lines}\n]}}\n'


def _lines(drawn: JsonValue) -> str:
    if not (isinstance(drawn, dict) and isinstance(inner := drawn.get("panels"), list) and inner):
        return f"  {json.dumps(drawn)}"
    head = json.dumps({name: value for name, value in drawn.items() if name != "panels"})
    panels = ",\n".join(f"    {json.dumps(panel)}" for panel in inner)
    return f'  {head[:-1]}, "panels": [\n{panels}\n  ]}}'


if __name__ == "__main__":
    sys.exit(print_all(dashboard_page()))
