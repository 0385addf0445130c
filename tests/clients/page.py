"""The page docs/clients.md: which client was seen to do what."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path

COLUMNS = ("text", "streaming", "history", "tools", "structured output", "embeddings", "errors")
HEAD = """# Clients

Which clients were run against a real server over HTTP, each in an environment of its own, with examples for text,
streams, the history of a conversation, tools, structured output, embeddings and errors (`tests/clients/examples`). A
tool or a schema is asked for in a way that the answer must follow, since the model is small: what is tested is the way
there and back.

Made by: `make clients-test`
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one client. reason: why it was not run"""

    name: str
    api: str
    version: str
    checks: list[dict]
    reason: str = ""


def write_page(path: Path, outcomes: list[Outcome], *, peregrine: str, model: str) -> None:
    lines = [HEAD, f"Peregrine {peregrine}, {model}, {date.today():%B %Y}.", ""]
    lines += [f"| client | version | API | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    notes = []
    for outcome in outcomes:
        found = {check["check"]: check for check in outcome.checks}
        cells = ["" if name not in found else "yes" if found[name]["ok"] else "no" for name in COLUMNS]
        lines.append(f"| {outcome.name} | {outcome.version} | {outcome.api} | {' | '.join(cells)} |")
        failed = [(name, check["detail"]) for name, check in found.items() if not check["ok"]]
        notes += [f"* {outcome.name}, {name}: {_one_line(detail)}" for name, detail in failed]
        if outcome.reason:
            notes.append(f"* {outcome.name} was not run: {_one_line(outcome.reason)}")
    lines += ["", "An empty cell: not tried.", *(["", *notes] if notes else [])]
    path.write_text("\n".join(lines) + "\n")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
