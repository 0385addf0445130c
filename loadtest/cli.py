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
from dataclasses import replace
from pathlib import Path

import msgspec

from loadtest.arguments import parse
from loadtest.client.client import Api, run_in_loop
from loadtest.compare.comparison import Comparison, Quietness, Watch
from loadtest.compare.hosting import RunningHost
from loadtest.compare.launch import without_keys
from loadtest.compare.measure import Case
from loadtest.extra import check_extra
from loadtest.operation.runner import SCENARIOS, SOAK, about, run_scenarios
from loadtest.operation.stage import StageOptions
from loadtest.planning import cases_of, hosts_of, scenario_of, seed_of
from loadtest.report.environment import read_environment
from loadtest.report.result_files import dated_path, save_result
from loadtest.report.session import Session, load
from loadtest.report.slo import ServiceLevel
from loadtest.searching import Searcher
from loadtest.speculation import Watcher, options_of, speculation_cases


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. 2: nothing could be measured, or not all; else 0, or 1 where a server answered no request,
    `spec` found a text that differs, or `search` no rate."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.command == "operation":
        return _operate(options, shlex.join(["python", "-m", "loadtest", *_without_results(arguments)]))
    check_extra("tabulate", *([] if options.command in ("run", "table") else ["matplotlib"]))
    command = shlex.join(["python", "-m", "loadtest", *_without_keys(arguments)])
    try:
        if options.command == "table":
            _print_tables(options.file)
            return 0
        options.seed = seed_of(options)
        sessions = _MEASURING.get(options.command, _measure_once)(options, command)
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("loadtest: ended by a signal; nothing was written", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError, OSError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    if any(session.error for session in sessions):
        return 2
    is_good = all(run.figures.num_answers for session in sessions for run in session.measurements)
    has_found = all(session.search is None or session.search.best is not None for session in sessions)
    return 0 if is_good and has_found and not any(session.differences for session in sessions) else 1


def _operate(options: argparse.Namespace, command: str) -> int:
    if options.list:
        print(*(f"{name}: {about(name)}" for name in SCENARIOS), sep="\n")
        return 0
    stage = StageOptions(
        engine=options.engine,
        model=options.model,
        duration=options.duration,
        num_clients=options.clients,
        max_tokens=options.output,
        seed=options.seed,
        settings=tuple(options.set),
    )
    names = options.name or [name for name in SCENARIOS if name != SOAK]
    return run_scenarios(names, stage, command=command, results=options.results)


def _print_tables(files: list[Path]) -> None:
    from loadtest.report.speculation import speculation_tables
    from loadtest.report.tables import markdown

    sessions = [load(file) for file in files]
    if all(session.kind == "spec" for session in sessions):
        print(speculation_tables(sessions))
    else:
        print("\n\n".join(markdown(session) for session in sessions))


def _measure_once(options: argparse.Namespace, command: str) -> list[Session]:
    cases = cases_of(options, seed=options.seed)  # first: a scenario says which API its server is to speak
    hosts = hosts_of(options, seed=options.seed)
    session = run_in_loop(_measure(options, command, hosts, cases))
    _show(session, options)
    return [session]


def _measure_speculation(options: argparse.Namespace, command: str) -> list[Session]:
    """A session for each workload, written when it ends. One that ends early is the last."""
    from loadtest.report.speculation import speculation_tables

    sessions: list[Session] = []
    for workload in options.workload:
        own = options_of(options, workload)
        hosts = hosts_of(own, seed=own.seed)
        watcher = Watcher([host.peer.name for host in hosts if host.peer.speculation], own.rounds)
        cases = speculation_cases(own, seed=own.seed)
        session = run_in_loop(_measure(own, command, hosts, cases, watcher))
        sessions.append(replace(session, num_compared=watcher.num_compared, differences=watcher.differences))
        _write(sessions[-1], own)
        if session.error:
            print(f"loadtest: {session.error}; what was measured before is in the file", file=sys.stderr)
            break
    print(speculation_tables(sessions))
    return sessions


def _search(options: argparse.Namespace, command: str) -> list[Session]:
    """The search for the highest rate. What was measured before a signal is written too, and says so."""
    from loadtest.report.search import search_table

    if options.scenario is not None:
        scenario_of(options)
    options.api = options.api or Api.COMPLETIONS
    (host,) = hosts_of(options, seed=options.seed)
    session = run_in_loop(_measure_search(options, command, Searcher(options, host, options.slo or ServiceLevel())))
    if session.search is not None:
        print(search_table(session.search))
    _write(session, options)
    return [session]


async def _measure_search(options: argparse.Namespace, command: str, searcher: Searcher) -> Session:
    search, error = None, ""
    with _ended_by_a_signal():
        await searcher.host.begin()
        try:
            search = await searcher.search()
        except (asyncio.CancelledError, RuntimeError, ValueError, OSError) as reason:
            if not searcher.measurements:
                raise
            error = str(reason) or "ended by a signal"
    return Session(
        kind=options.command,
        command=command,
        seed=options.seed,
        environment=read_environment(),
        servers=[searcher.host.record()],
        scenarios=[case.scenario() for case in searcher.cases],
        measurements=searcher.measurements,
        error=error,
        service_level=options.slo.limits,
        search=search,
    )


async def _measure(
    options: argparse.Namespace,
    command: str,
    hosts: list[RunningHost],
    cases: list[Case],
    watch: Watch | None = None,
) -> Session:
    """With `watch`, what was measured before an error or a signal is a session too, which says so."""
    comparison = Comparison(
        hosts=hosts,
        cases=cases,
        num_rounds=options.rounds,
        service_level=options.slo,
        quietness=None if options.quiet is None else Quietness(options.quiet),
        freezes_idle=options.freeze_idle,
        takes_one_at_a_time=options.one_at_a_time,
        shows_progress=True,
        watch=watch,
    )
    environment, error = read_environment(), ""
    try:
        with _ended_by_a_signal():
            await comparison.run()
    except (asyncio.CancelledError, RuntimeError, ValueError, OSError) as reason:
        if watch is None or not comparison.measurements:
            raise
        error = str(reason) or "ended by a signal"
    return Session(
        kind=options.command,
        command=command,
        seed=options.seed,
        environment=environment,
        servers=[host.record() for host in hosts],
        scenarios=[case.scenario() for case in cases],
        measurements=comparison.measurements,
        ours=options.ours,
        error=error,
        service_level={} if options.slo is None else options.slo.limits,
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
    if options.command in ("scenario", "replay"):
        print(run_table(session.measurements[0]), f"seed {session.seed}", sep="\n")
    else:
        print(comparison_tables(session))
    _write(session, options)


def _write(session: Session, options: argparse.Namespace) -> None:
    from loadtest.report.page import html_page

    path = dated_path(options.results, options.name, session.environment)
    save_result(session, path)
    path.with_suffix(".html").write_text(html_page(session))
    print(f"\nwritten: {path} and {path.with_suffix('.html').name}")


def _without_results(arguments: list[str]) -> list[str]:
    """The command without the folder of its results, which lies elsewhere on every machine."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [argument for before, argument in pairs if "--results" not in (before, argument.partition("=")[0])]


def _without_keys(arguments: list[str]) -> list[str]:
    """The command without API keys, its peers' and their commands' included, so that it may be kept in a file."""
    pairs = zip(["", *arguments], arguments, strict=False)
    kept = ["..." if before == "--api-key" else argument for before, argument in pairs]
    return [without_keys(re.sub(r"((?:^--|,)api[-_]key=)[^,]*", r"\1...", argument)) for argument in kept]


_MEASURING = {"spec": _measure_speculation, "search": _search}
