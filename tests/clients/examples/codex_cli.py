"""The Codex CLI: one turn over the Responses API, without a terminal. The interpreter is that of whoever runs it."""

import json
import os
import subprocess
import tempfile

from checks import KEY, MODEL, URL, run

FOLDER = tempfile.mkdtemp()
PROVIDER = f'{{name="local", base_url="{URL}/v1", wire_api="responses", env_key="PEREGRINE_KEY"}}'


def codex(*arguments: str) -> list[dict]:
    command = [
        os.environ["CLIENT_BIN"] + "/codex", "exec", "--json", "--skip-git-repo-check", "-s", "read-only", "-C", FOLDER,
        "-m", MODEL, "-c", f"model_providers.local={PROVIDER}", "-c", "model_provider=local", *arguments,
    ]  # fmt: skip
    environment = os.environ | {"CODEX_HOME": FOLDER, "PEREGRINE_KEY": KEY}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, (events[-2:], done.stderr[-300:])
    return events


def text() -> None:
    events = codex("Say hello.")
    assert [event["type"] for event in events][-1] == "turn.completed", events[-2:]


def history() -> None:
    events = codex("resume", "--last", "And again.")
    assert [event["type"] for event in events][-1] == "turn.completed", events[-2:]


run({"text": text, "history": history})
