"""The commands of `python -m loadtest`."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from loadtest.arguments import parse
from loadtest.compare import Comparison, Quietness
from loadtest.comparison import terminal_table
from loadtest.environment import read_environment
from loadtest.launch import without_keys
from loadtest.markdown import markdown
from loadtest.planning import cases_of, hosts_of, seed_of
from loadtest.plot import html_page
from loadtest.progress import TerminalProgress
from loadtest.report import report
from loadtest.result_files import save_result
from loadtest.session import Session, load

Result = TypeVar("Result")


def main(arguments: list[str] | None = None) -> int:
    """0: measured; 1: measured, but a server gave no single answer; 2: it could not be tried."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    command = shlex.join(["python", "-m", "loadtest", *_without_keys(arguments)])
    try:
        if options.command == "table":
            print(markdown(load(options.file)))
            return 0
        session = run_in_loop(_measure(options, command))
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("loadtest: ended by a signal; nothing was written", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError, OSError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    _show(session, options)
    return 0 if all(measurement.figures.num_answers for measurement in session.measurements) else 1


def run_in_loop(work: Coroutine[None, None, Result]) -> Result:
    """Runs on uvloop where it is installed: half the cost per event."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


async def _measure(options: argparse.Namespace, command: str) -> Session:
    seed = seed_of(options)
    hosts = hosts_of(options, seed=seed)
    cases = cases_of(options, seed=seed)
    quiet = getattr(options, "quiet", None)
    comparison = Comparison(
        hosts=hosts,
        cases=cases,
        num_rounds=getattr(options, "rounds", 1),
        service_level=options.slo,
        quietness=None if quiet is None else Quietness(quiet),
        progress=TerminalProgress,
        freezes_idle=getattr(options, "freeze_idle", False),
        takes_one_at_a_time=getattr(options, "one_at_a_time", False),
    )
    environment = read_environment()
    with _ended_by_a_signal():
        measurements = await comparison.run()
    return Session(
        kind=options.command,
        command=command,
        seed=seed,
        environment=environment,
        servers=[host.record() for host in hosts],
        scenarios=[case.scenario() for case in cases],
        measurements=measurements,
        ours=getattr(options, "ours", []),
    )


@contextmanager
def _ended_by_a_signal() -> Iterator[None]:
    """SIGTERM is an interrupt like any other: servers that were started, or paused, are not left behind."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def _show(session: Session, options: argparse.Namespace) -> None:
    if options.command == "run":
        if options.json is not None and str(options.json) == "-":
            print(msgspec.json.format(msgspec.json.encode(session), indent=1).decode())
            return
        print(report(session.measurements[0]), f"\n  seed               {session.seed}", sep="")
        if options.json is not None:
            save_result(session, options.json)
        return
    print(terminal_table(session))
    moment = session.environment.date[:19].replace(":", "").replace("T", "-")
    path = Path(options.results) / f"{moment}-{options.name}.json"
    save_result(session, path)
    path.with_suffix(".html").write_text(html_page(session))
    print(f"\nwritten: {path} and {path.with_suffix('.html').name}")


def _without_keys(arguments: list[str]) -> list[str]:
    """The command as it may be kept in a file: API keys are left out."""
    kept = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before == "--api-key":
            argument = "..."
        elif argument.startswith("--api-key="):
            argument = "--api-key=..."
        elif ",api_key=" in argument:
            head, _, tail = argument.partition(",api_key=")
            argument = ",".join([f"{head},api_key=...", *tail.split(",")[1:]])
        kept.append(without_keys(argument))  # a peer's command has its own
    return kept
