"""Output for a person at the terminal: the phases of the start, a banner, a log line per second while it works."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import TextIO

from engine.ipc.messages import ModelInfo
from engine.types import StepStats
from server.config import Config
from server.telemetry.observers import NullObserver
from server.version import VERSION

console_log = logging.getLogger("peregrine.console")
step_log = logging.getLogger("peregrine.steps")

STATS_INTERVAL = 1.0  # seconds


class Console(NullObserver):
    """Prints to a stream, one clean line at a time. `begun_at`: when the process began, seconds, time.monotonic."""

    def __init__(self, config: Config, stream: TextIO, *, begun_at: float) -> None:
        self._config = config
        self._stream = stream
        self._begun_at = begun_at
        self._is_json = config.logging.format == "json"
        self._window = StepWindow()

    def say(self, text: str) -> None:
        """Prints a line, or loses it: a full disk or a closed pipe must not end the server. With JSON, logs it."""
        if self._is_json:
            console_log.info(" ".join(text.split()))
            return
        with contextlib.suppress(OSError):
            print(text, file=self._stream, flush=True)

    def timed(self, name: str, detail: str) -> None:
        self.say(f"{time.monotonic() - self._begun_at:6.2f} s  {name:<10} {detail}".rstrip())

    def on_phase(self, name: str, detail: str) -> None:
        self.timed(name, detail)

    def on_death(self, reason: str) -> None:
        self.timed("died", reason)

    def on_replay(self, num_requests: int) -> None:
        self.timed("replay", f"{num_requests} requests go on where they were")

    def on_step(self, stats: StepStats) -> None:
        """One log line per second, as long as there are steps."""
        if (line := self._window.add(stats, time.monotonic())) is not None:
            step_log.info(line)

    def banner(self, model: ModelInfo, url: str) -> None:
        self.say(banner(self._config, model, url, seconds=time.monotonic() - self._begun_at))


class StepWindow:
    """Sums the steps of about a second."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._num_tokens = 0
        self._started_at = 0.0
        self._is_idle = True  # since the last step

    def add(self, stats: StepStats, now: float) -> str | None:
        """Adds a step. Returns the line of the window when its second is over, else None."""
        if self._is_idle:
            self._num_steps, self._num_tokens, self._started_at = 0, 0, now - stats.seconds
        self._is_idle = stats.num_running == stats.num_waiting == 0
        self._num_steps += 1
        self._num_tokens += stats.num_tokens
        seconds = now - self._started_at
        if seconds < STATS_INTERVAL:
            return None
        line = (
            f"steps_per_second={self._num_steps / seconds:.1f} tokens_per_second={self._num_tokens / seconds:.0f} "
            f"running={stats.num_running} waiting={stats.num_waiting} "
            f"kv_usage={stats.num_owned_blocks / max(stats.num_blocks, 1):.3f}"
        )
        self._num_steps, self._num_tokens, self._started_at = 0, 0, now
        return line


def banner(config: Config, model: ModelInfo, url: str, *, seconds: float) -> str:
    dtype = _resolved(model, "model.dtype", config.model.dtype)
    rows = [
        ("url", url),
        ("model", f"{config.model_names()[0]} ({model.architecture}, {model.num_parameters / 1e6:,.1f} M parameters)"),
        ("dtype", f"{dtype}{_kept_as(model)}"),
        ("context", f"{model.max_model_len:,} tokens per request, {model.num_kv_tokens:,} tokens of KV cache"),
        ("try", example(config, url, has_chat_template=model.tokenizer.chat_template is not None)),
    ]
    lines = [f"Peregrine {VERSION} is ready after {seconds:.1f} s", *(f"  {name:<8} {value}" for name, value in rows)]
    return "\n".join(["", *lines, ""])


def _kept_as(model: ModelInfo) -> str:
    """The formats that the matrices are kept in, as counted: what was asked for is not what each of them can have."""
    counts: dict[str, int] = {}
    for formats in model.weights.values():
        for name, count in formats.items():
            counts[name] = counts.get(name, 0) + count
    most_first = sorted(counts.items(), key=lambda item: -item[1])
    return f", matrices kept as {', '.join(f'{name} ({n})' for name, n in most_first)}" if counts else ""


def _resolved(model: ModelInfo, name: str, configured: str) -> str:
    setting = model.settings.get(name)
    return configured if setting is None else str(setting.value)


def example(config: Config, url: str, *, has_chat_template: bool) -> str:
    """A curl command that works as it stands."""
    name = config.model_names()[0]
    path, body = "/v1/completions", json.dumps({"model": name, "prompt": "The capital of France is", "max_tokens": 16})
    if has_chat_template:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        path, body = "/v1/chat/completions", json.dumps({"model": name, "messages": messages})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.needs_key else ""
    quoted = body.replace("'", "'\\''")
    return f"curl {url}{path} -H 'Content-Type: application/json'{key} -d '{quoted}'"


def process_begun_at() -> float:
    """When this process began, in time.monotonic's seconds: before its imports. Now, where that cannot be known."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), in clock ticks
        return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, AttributeError):  # not Linux
        return time.monotonic()
