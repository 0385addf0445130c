"""The pages in a real browser: they work as a person uses them, under their own policy, and ask nothing elsewhere.

With a folder in PEREGRINE_SCREENSHOTS, the pictures stay there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "page_in_browser.cjs"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")


def has_playwright() -> bool:
    if shutil.which("node") is None:
        return False
    return subprocess.run(["node", "-e", "require('playwright-core')"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; make browser-test"),
]


def use(url: str, folder: Path, *key: str) -> dict:
    if not has_playwright():
        pytest.skip("playwright-core is not there for node; make browser-test")
    folder = Path(os.environ.get("PEREGRINE_SCREENSHOTS", folder))
    folder.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        ["node", str(SCRIPT), url, str(folder), *key],
        capture_output=True, text=True, timeout=240, env=os.environ | {"CHROMIUM": str(CHROMIUM)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("key", [(), ("secret-key",)], ids=["open", "with a key"])
def test_the_pages_are_used_by_a_person(start_server, tmp_path, key) -> None:
    options = ("--api-key", *key) if key else ()
    with start_server(*options) as server:
        seen = use(server.url, tmp_path, *key)
    assert seen["problems"] == [], "also what the policy forbids is a problem"
    assert seen["elsewhere"] == []
    said = seen["messages"]
    assert len(said) == 4
    assert all(said)
    assert "tokens/s" in seen["figures"][0]
    assert "TTFT" in seen["figures"][-1]
    assert float(seen["output"]) > 0
    assert len(seen["points"].split()) >= 2
    assert "tiny" in seen["facts"]
    assert {"/v1/chat/completions", "/v1/models", "/metrics"} <= {
        path.replace("\u200b", "") for path in seen["operations"]
    }
    assert seen["tried"].strip().startswith("200")
    assert seen["requests"].count("/v1/chat/completions") == 2
