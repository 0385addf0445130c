"""`llm`, the command line tool, with a model of an OpenAI-compatible server."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import BIRD, KEY, MODEL, URL, is_bird, run

folder = Path(tempfile.mkdtemp())
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: local\n  model_name: {MODEL}\n  api_base: {URL}/v1\n  api_key_name: local\n"
    "  supports_schema: true\n  supports_tools: true\n"
)
ENVIRONMENT = os.environ | {"LLM_USER_PATH": str(folder)}


def llm(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("llm")), *arguments]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-300:]
    return done.stdout


def text() -> None:
    assert llm("-m", "local", "--key", KEY, "--no-stream", "-o", "max_tokens", "20", "Name a bird.").strip()


def streaming() -> None:
    assert llm("-m", "local", "--key", KEY, "-o", "max_tokens", "20", "Name a bird.").strip()


def history() -> None:
    assert llm("-m", "local", "--key", KEY, "-o", "max_tokens", "20", "-c", "Another.").strip()


def structured_output() -> None:
    import json

    schema = json.dumps(BIRD)
    assert is_bird(llm("-m", "local", "--key", KEY, "-o", "max_tokens", "100", "--schema", schema, "Name a bird."))


run({"text": text, "streaming": streaming, "history": history, "structured output": structured_output})
