"""Runs scenarios by their names, one after the other, and writes a result file for each."""

from __future__ import annotations

import asyncio
import importlib
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import httpx

from loadtest.client.client import run_in_loop
from loadtest.operation.findings import OperationResult
from loadtest.operation.stage import Stage, StageOptions
from loadtest.report.environment import read_environment
from loadtest.report.result_files import dated_path, save_result

SCENARIOS = (
    "overload", "retry_after", "fairness", "mixed_load",
    "device_hangs", "engine_in_circles", "engine_killed", "engine_stopped", "server_killed",
    "clients_never_read", "clients_vanish", "disk_full", "descriptors_run_out", "memory_runs_out", "clock_jumps",
    "collectors_dead", "soak",
)  # fmt: skip
SOAK = "soak"  # is run where it is named


class Scenario(Protocol):
    """The interface of a scenario's module. Its docstring says what has to hold."""

    async def run(self, stage: Stage) -> None:
        """Raises RuntimeError, ValueError or OSError where it could not be played to its end."""
        ...


def scenario_of(name: str) -> Scenario:
    return cast(Scenario, importlib.import_module(f"loadtest.operation.scenarios.{name}"))


def about(name: str) -> str:
    """The first sentence of a scenario's docstring."""
    return " ".join((scenario_of(name).__doc__ or "").split("\n\n")[0].split())


def run_scenarios(names: Sequence[str], options: StageOptions, *, command: str, results: Path | None) -> int:
    """0: all that was asserted holds; 1: some does not; 2: a scenario could not be played to its end."""
    worst = 0
    for name in names:
        print(f"{name}: {about(name)}", file=sys.stderr)
        result = play(name, options, command=command)
        for check in result.checks:
            print(f"  {'holds' if check.holds else 'FAILS'}: {check.statement}: {check.seen}")
        if result.error:
            print(f"  not played to its end: {result.error}")
        if results is not None:
            path = dated_path(results, f"operation-{name.replace('_', '-')}", result.environment)
            save_result(result, path)
            print(f"  written: {path}")
        worst = max(worst, 2 if result.error else int(not result.is_good))
    return worst


async def _run_until_a_signal(name: str, stage: Stage) -> None:
    """Plays a scenario; SIGTERM cancels it, so that the servers that it started are ended."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await scenario_of(name).run(stage)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def play(name: str, options: StageOptions, *, command: str = "") -> OperationResult:
    """Plays one scenario. Whatever becomes of it, nothing that it started runs afterwards."""
    environment, began, error = read_environment(), time.monotonic(), ""
    with tempfile.TemporaryDirectory(prefix="peregrine-operation-", ignore_cleanup_errors=True) as folder:
        stage = Stage(options, Path(folder))
        try:
            run_in_loop(_run_until_a_signal(name, stage))
        except (RuntimeError, ValueError, OSError, httpx.HTTPError) as reason:
            error = str(reason) or type(reason).__name__
        except (KeyboardInterrupt, asyncio.CancelledError):
            error = "ended by a signal"
    return OperationResult(
        kind="operation",
        scenario=name,
        about=about(name),
        command=command,
        environment=environment,
        options=options.figures,
        seconds=round(time.monotonic() - began, 1),
        checks=stage.findings.checks,
        figures=stage.findings.figures,
        error=error,
    )
