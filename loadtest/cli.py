"""The commands of `python -m loadtest`."""

from __future__ import annotations

import argparse
import asyncio
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from loadtest.arguments import parse
from loadtest.client.client import run_in_loop
from loadtest.compare.comparison import Comparison, Quietness
from loadtest.compare.launch import without_keys
from loadtest.extra import check_extra
from loadtest.planning import cases_of, hosts_of, seed_of
from loadtest.report.environment import read_environment
from loadtest.report.result_files import dated_path, save_result
from loadtest.report.session import Session, load


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. 0: measured; 1: measured, but a server answered no request; 2: nothing could be measured."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    check_extra("tabulate", *(["matplotlib"] if options.command in ("sweep", "compare") else []))
    command = shlex.join(["python", "-m", "loadtest", *_without_keys(arguments)])
    try:
        if options.command == "table":
            from loadtest.report.tables import markdown

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


async def _measure(options: argparse.Namespace, command: str) -> Session:
    seed = seed_of(options)
    hosts = hosts_of(options, seed=seed)
    cases = cases_of(options, seed=seed)
    comparison = Comparison(
        hosts=hosts,
        cases=cases,
        num_rounds=options.rounds,
        service_level=options.slo,
        quietness=None if options.quiet is None else Quietness(options.quiet),
        freezes_idle=options.freeze_idle,
        takes_one_at_a_time=options.one_at_a_time,
        shows_progress=True,
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
        ours=options.ours,
    )


@contextmanager
def _ended_by_a_signal() -> Iterator[None]:
    """A context in which SIGTERM raises, so that servers that were started or paused are ended or resumed."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def _show(session: Session, options: argparse.Namespace) -> None:
    from loadtest.report.tables import comparison_tables, run_table

    if options.command == "run":
        if str(options.json) == "-":
            print(msgspec.json.format(msgspec.json.encode(session), indent=1).decode())
            return
        print(run_table(session.measurements[0]), f"seed {session.seed}", sep="\n")
        if options.json is not None:
            save_result(session, options.json)
        return
    from loadtest.report.page import html_page

    print(comparison_tables(session))
    path = dated_path(options.results, options.name, session.environment)
    save_result(session, path)
    path.with_suffix(".html").write_text(html_page(session))
    print(f"\nwritten: {path} and {path.with_suffix('.html').name}")


def _without_keys(arguments: list[str]) -> list[str]:
    """The command without API keys, its peers' and their commands' included, so that it may be kept in a file."""
    pairs = zip(["", *arguments], arguments, strict=False)
    kept = ["..." if before == "--api-key" else argument for before, argument in pairs]
    return [without_keys(re.sub(r"((?:^--|,)api[-_]key=)[^,]*", r"\1...", argument)) for argument in kept]
