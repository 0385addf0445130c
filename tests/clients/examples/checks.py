"""What the Python examples share: a check is a function that fails by raising, and its outcome is a line of JSON."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable

URL = os.environ.get("PEREGRINE_URL", "http://127.0.0.1:8000")
MODEL = os.environ.get("PEREGRINE_MODEL", "smollm2-135m-instruct")
KEY = os.environ.get("PEREGRINE_KEY", "none")

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
BIRD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "legs": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["name", "legs"],
    "additionalProperties": False,
}
QUESTION = "What is the weather in Paris?"


def run(checks: dict[str, Callable[[], object]]) -> None:
    """Runs all of them, whatever becomes of each."""
    for name, check in checks.items():
        detail = ""
        try:
            result = check()
            if inspect.isawaitable(result):
                asyncio.run(result)
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"[:300]
            traceback.print_exc()
        print(json.dumps({"check": name, "ok": not detail, "detail": detail}), flush=True)
    sys.stdout.flush()


def is_weather(arguments: object) -> bool:
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    return isinstance(given, dict) and given.get("city") in ("Paris", "Rome")


def is_bird(text: str) -> bool:
    bird = json.loads(text)
    return set(bird) == {"name", "legs"} and isinstance(bird["legs"], int)
