"""The README's tables, from sessions whose figures are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.report.environment import read_environment
from loadtest.report.result_files import save_result
from loadtest.report.session import Scenario, Session, load
from loadtest.report.tables import markdown
from tests.support.measurements import measurement, server

DECODING = Scenario("concurrency 4", "128", "64", 4, None, 8, None)
PREFILL = Scenario("prefill 1024", "1024", "1", 4, None, 8, None)


@pytest.fixture
def session() -> Session:
    """Ours: a plain and an int8 one. Theirs: a 16-bit one that is best at decoding, an 8-bit one at prefill."""
    gib = 2**30
    rates = {"ours": (100.0, 900.0), "ours-int8": (150.0, 500.0), "x": (120.0, 800.0), "y": (75.0, 1000.0)}
    memory = {"ours": 1.0, "ours-int8": 0.5, "x": 4.0, "y": 2.0}
    measurements = []
    for name, (decoding, prefill) in rates.items():
        measurements += [
            measurement(name, DECODING, decoding, 1 / decoding, memory=int(memory[name] * gib)),
            measurement(name, DECODING, decoding, 1 / decoding, round=1),
            measurement(name, PREFILL, prefill, 1.0, memory=int(0.25 * gib)),
        ]
    servers = [server("ours", "16-bit", (5.0, 3.0, 4.0)), server("ours-int8", "8-bit", (6.0,))]
    servers += [server("x", "16-bit", (80.0,)), server("y", "8-bit", (2.0,))]
    environment = replace(
        read_environment(), date="2030-05-06T07:08:09", commit="c0ffee", machine="Abacus", packages={}
    )
    ours = ["ours", "ours-int8"]
    return Session("compare", "", 1, environment, servers, [DECODING, PREFILL], measurements, ours=ours)


def rows(text: str, table: int) -> dict[str, list[str]]:
    """The cells of a table by the first of its row."""
    lines = text.split("\n\n")[table].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|-")]
    return {first: rest for first, *rest in cells}


def test_each_server_has_a_row_of_medians(session) -> None:
    table = rows(markdown(session), 0)
    titles = [
        "concurrency 4: output tok/s (ms per token)",
        "prefill of 1024 tokens: prompt tok/s",
        "start, s",
        "memory, GiB",
    ]
    assert table[""] == titles
    assert table["ours, 16-bit"] == ["100 (10.0)", "900", "4.0", "1.00"]
    assert table["y, 8-bit"] == ["75 (13.3)", "1,000", "2.0", "2.00"]
    waits = rows(markdown(session), 1)
    assert waits[""] == ["concurrency 4: ITL p99, ms"]
    assert waits["x, 16-bit"] == ["8.3"]


def test_ratios_compare_the_best_of_both_sides_and_above_one_is_always_better(session) -> None:
    table = rows(markdown(session), 0)
    # output 150 / 120, ms 8.33 / 6.67; prefill 900 / 1000; start 2 / 4; memory 2 / 0.5
    assert table["**ours at its best / best of the peers**"] == ["1.25 (1.25)", "0.90", "0.50", "4.00"]
    assert table["the same at 16-bit"] == ["0.83 (0.83)", "1.12", "20.00", "4.00"]
    assert table["the same at 8-bit"] == ["2.00 (2.00)", "0.50", "0.33", "4.00"]
    assert rows(markdown(session), 1)["the same at 8-bit"] == ["2.00"]


def test_the_caption_says_when_where_and_with_what(session) -> None:
    caption = markdown(session).split("\n\n")[-1]
    for words in ("2030-05-06", "c0ffee", "Abacus", "x 1", "Prompts of 128 tokens, outputs of 64", "2 alternating"):
        assert words in caption


def test_what_was_not_measured_is_not_a_number(session) -> None:
    silent = replace(session, servers=[server(s.name) for s in session.servers])
    silent = replace(silent, measurements=[replace(m, memory=None) for m in session.measurements if m.server != "y"])
    table = rows(markdown(silent), 0)
    assert len(table[""]) == 2  # neither start nor memory
    assert table["y"] == ["- (-)", "-"]
    assert table["**ours at its best / best of the peers**"] == ["1.25 (1.25)", "1.12"]


def test_without_a_peer_there_is_no_ratio(session) -> None:
    alone = replace(session, servers=session.servers[:1], ours=[])
    assert list(rows(markdown(alone), 0)) == ["", "ours, 16-bit"]


def test_failures_and_disturbed_runs_are_said(session) -> None:
    first, *rest = session.measurements
    failed = replace(first, figures=replace(first.figures, num_failures=3))
    noisy = replace(session, measurements=[failed, *rest[:-1], replace(rest[-1], is_disturbed=True)])
    assert rows(markdown(noisy), 0)["ours, 16-bit"][0] == "100 (10.0), 3 failed"
    assert "1 of 12 runs disturbed" in markdown(noisy)


def test_a_file_says_the_same_as_the_session_it_was_made_from(session, tmp_path) -> None:
    save_result(session, tmp_path / "s.json")
    assert markdown(load(tmp_path / "s.json")) == markdown(session)
