"""Claude Code: one turn over the Messages API, without a terminal. The interpreter is that of whoever runs it."""

import json
import os
import subprocess
import tempfile

from checks import KEY, MODEL, URL, run

FOLDER = tempfile.mkdtemp()


def claude(*arguments: str) -> dict:
    command = [
        os.environ["CLIENT_BIN"] + "/claude", "-p", "--model", MODEL, "--output-format", "json", "--system-prompt",
        "Be brief.", *arguments,
    ]  # fmt: skip
    environment = os.environ | {
        "ANTHROPIC_BASE_URL": URL, "ANTHROPIC_API_KEY": KEY, "CLAUDE_CONFIG_DIR": FOLDER,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1", "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "64", "API_TIMEOUT_MS": "600000",
    }  # fmt: skip
    done = subprocess.run(
        command, env=environment, cwd=FOLDER, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-300:])
    return json.loads(done.stdout)


def text() -> None:
    answer = claude("--tools", "", "Say hello.")
    assert not answer["is_error"], answer


def history() -> None:
    answer = claude("--tools", "", "--continue", "And again.")
    assert not answer["is_error"], answer


def tools() -> None:
    answer = claude("--tools", "Read", "Say hello.")
    assert not answer["is_error"], answer


run({"text": text, "history": history, "tools": tools})
