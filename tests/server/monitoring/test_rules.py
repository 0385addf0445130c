"""The rules for Prometheus: made of the registry, each with a test of promtool's."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml

from server.monitoring.rules import ALERTS, RECORDINGS, rules_page
from server.settings import all_settings
from server.telemetry.metric_families import FAMILIES
from tests import ROOT

MONITORING = ROOT / "configs" / "monitoring"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def test_the_file_is_made_of_the_rules() -> None:
    path = MONITORING / "rules.yml"
    assert path.read_text() == rules_page(), "run: python -m server.monitoring.rules > configs/monitoring/rules.yml"


def test_rules_ask_for_what_there_is() -> None:
    known = {family.full_name for family in FAMILIES}
    recorded = {rule.name for rule in RECORDINGS}
    assert len(recorded) == len(RECORDINGS)
    for expression in [rule.expression for rule in RECORDINGS] + [alert.whole for alert in ALERTS]:
        for name in re.findall(r"(?<![:\w])peregrine_\w+", expression):
            assert re.sub(r"_(bucket|sum|count)$", "", name) in known, expression
        assert set(re.findall(r"\w+:peregrine_\w+:\w+", expression)) <= recorded


def test_alerts_say_what_happened_and_what_to_do() -> None:
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)
    settings = all_settings()
    sections = {name.partition(".")[0] for name in settings if "." in name}
    for alert in ALERTS:
        assert alert.severity in ("critical", "warning", "info")
        assert alert.description.endswith(".")
        for section, key in re.findall(r"\b([a-z_]+)\.([a-z_]+)\b", alert.description):
            assert section not in sections or f"{section}.{key}" in settings, alert.description


def test_prometheus_is_told_of_the_rules() -> None:
    assert yaml.safe_load((MONITORING / "prometheus.yml").read_text())["rule_files"] == ["rules.yml"]


def test_every_rule_has_a_test() -> None:
    text = (MONITORING / "rules.test.yml").read_text()
    for name in [alert.name for alert in ALERTS] + [rule.name for rule in RECORDINGS]:
        is_like_another = re.search(r"_(inter_token_latency|request_queue)_seconds:p\d+", name)  # made in one loop
        assert name in text or is_like_another, f"{name} is not tested in configs/monitoring/rules.test.yml"


@needs_promtool
@pytest.mark.parametrize("command", [["check", "rules", "rules.yml"], ["test", "rules", "rules.test.yml"]])
def test_promtool_agrees(command: list[str]) -> None:
    result = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
