"""The dashboard: it is what the registry and its design say, complete, readable, and asks only for what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from server.monitoring.dashboard import DEATHS, dashboard_page
from server.monitoring.dashboard_rows import ROWS
from server.monitoring.panels import COLUMNS, Panel, Row
from server.monitoring.promql import Scope, ratio
from server.telemetry import metric_families as families
from server.telemetry.metric_families import FAMILIES
from tests import ROOT

PAGE = ROOT / "configs" / "monitoring" / "dashboard.json"
PANELS = [panel for row in ROWS for panel in row.panels]
OF_THE_PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total"}


def expressions() -> Iterator[str]:
    for panel in PANELS:
        yield from (query.expression for query in panel.queries)
    yield DEATHS


def metrics_of(expression: str) -> set[str]:
    """The names of what it asks for, without a histogram's endings."""
    return {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\b(?:peregrine|process)_\w+", expression)
    }


def drawn() -> Iterator[tuple[dict, bool]]:
    """The panels of the file, and whether they are seen before a row is opened."""
    for panel in json.loads(PAGE.read_text())["panels"]:
        yield panel, True
        yield from ((inner, False) for inner in panel.get("panels", ()))


def test_the_file_is_made_of_the_design() -> None:
    assert PAGE.read_text() == dashboard_page(), (
        "run: python -m server.monitoring.dashboard > configs/monitoring/dashboard.json"
    )


def test_every_family_is_drawn() -> None:
    asked = {name for expression in expressions() for name in metrics_of(expression)}
    assert {family.full_name for family in FAMILIES} - asked == set(), "give it a panel, in server/monitoring"


def test_nothing_is_asked_for_that_there_is_not() -> None:
    known = {family.full_name for family in FAMILIES} | OF_THE_PROCESS
    for expression in expressions():
        assert metrics_of(expression) <= known
        assert metrics_of(expression), expression


def test_every_expression_asks_for_the_model_and_the_replica_that_were_chosen() -> None:
    for expression in expressions():
        for name, braces in re.findall(r"\b((?:peregrine|process)_\w+)(\{.*?\})?", expression):
            assert 'instance=~"$instance"' in braces, expression
            assert ('model_name=~"$model"' in braces) == name.startswith("peregrine_"), expression


def test_panels_lie_side_by_side_and_not_on_each_other() -> None:
    taken: dict[tuple[int, int, bool], str] = {}
    for panel, is_seen in drawn():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                key = (x, y, is_seen)
                assert key not in taken or not is_seen, f"{panel['title']} lies on {taken[key]}"
                taken[key] = panel["title"]
    ids = [panel["id"] for panel, _ in drawn()]
    assert len(set(ids)) == len(ids)


def test_the_overview_is_open_and_the_rest_is_not_asked_before_it_is() -> None:
    assert [row.is_open for row in ROWS] == [True] + [False] * (len(ROWS) - 1)
    rows = [panel for panel, _ in drawn() if panel["type"] == "row"]
    assert [row["collapsed"] for row in rows] == [False] + [True] * (len(ROWS) - 1)
    assert all(row["panels"] for row in rows[1:])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_panels_say_what_they_show(row: Row) -> None:
    titles = [panel.title for panel in row.panels]
    assert len(set(titles)) == len(titles)
    for panel in row.panels:
        assert panel.description.endswith("."), panel.title
        assert panel.queries
        legends = [query.legend for query in panel.queries]
        assert len(set(legends)) == len(legends), f"{panel.title}: two series of one name"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_shares_have_a_bound_and_no_share_of_nothing(panel: Panel) -> None:
    for query in panel.queries:
        for whole in query.expression.split(" / ")[1:]:
            assert "> 0)" in whole, query.expression
    if panel.unit == "percentunit":
        assert panel.maximum == 1.0
        [of_the_file] = [p for p, _ in drawn() if p["title"] == panel.title and p["description"] == panel.description]
        assert (of_the_file["fieldConfig"]["defaults"]["min"], of_the_file["fieldConfig"]["defaults"]["max"]) == (0, 1)


def test_variables_choose_source_model_and_replica() -> None:
    whole = json.loads(PAGE.read_text())
    variables = {variable["name"]: variable for variable in whole["templating"]["list"]}
    assert set(variables) == {"datasource", "model", "instance"}
    for name in ("model", "instance"):
        assert variables[name]["query"]["query"].startswith(f"label_values({families.READY.full_name}")
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel, _ in drawn() if panel["type"] != "row")


def test_quantiles_are_of_all_replicas_together() -> None:
    scope = Scope('a="b"', "5m")
    assert scope.quantile(0.99, families.TIME_TO_FIRST_TOKEN) == (
        'histogram_quantile(0.99, sum by (le) (rate(peregrine_time_to_first_token_seconds_bucket{a="b"}[5m])))'
    )
    assert Scope("", "5m").rate(families.REQUESTS, by=("status",), not_status="2..") == (
        'sum by (status) (rate(peregrine_requests_total{status!~"2.."}[5m]))'
    )
    assert ratio("a", "b", on="c") == "a / on (c) group_left () (b > 0)"


@pytest.mark.parametrize("wrong", [{"outcoem": "stop"}, {"le": "1"}])
def test_an_unknown_label_is_a_mistake_here_and_not_an_empty_panel(wrong: dict[str, str]) -> None:
    with pytest.raises(AssertionError, match="has no label"):
        Scope("", "5m").rate(families.REQUESTS, **wrong)
