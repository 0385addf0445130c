"""`peregrine run-batch IN OUT`: answers a file of requests, with a model in this process's engine or by a server's.

What OUT has already is not asked again, so the same command goes on after any end.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from engine.ipc.messages import EXIT_CODES
from server.complain import complain
from server.settings import LoadedConfig

FLAGS = ("--url", "--concurrency", "--patience")
PATIENCE = 600.0  # seconds


def add_files(command: argparse.ArgumentParser) -> None:
    """The files, which come before MODEL."""
    command.add_argument("input", type=Path, metavar="IN", help="JSONL file of requests, in OpenAI's batch format")
    command.add_argument("output", type=Path, metavar="OUT", help="JSONL file of answers; what it has is kept")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The flags that this command has beside those of settings."""
    command.add_argument("--url", metavar="URL", help="a server that answers, instead of a model in this process")
    command.add_argument(
        "--concurrency",
        type=_count,
        metavar="N",
        help="requests at once (default: twice as many as the engine, or the server, runs at once)",
    )
    command.add_argument(
        "--patience",
        type=_seconds,
        default=PATIENCE,
        metavar="SECONDS",
        help="with --url: how long nothing may be answered before the command ends (default: %(default)g)",
    )


def run_batch(loaded: LoadedConfig, parsed: argparse.Namespace) -> int:
    """The exit code, of `server.cli.batch_work`."""
    if parsed.url is not None and parsed.model is not None:
        complain("config: MODEL and --url exclude each other: the server at the URL has its own")
        return EXIT_CODES["config"]
    if parsed.url is not None:
        from server.offline.over_http import key_for_server, problem_of  # httpx takes a moment, only this needs it

        if problem := problem_of(parsed.url, key_for_server(loaded.config.server.api_keys)):
            complain(f"config: {problem}")
            return EXIT_CODES["config"]
    try:
        _check_files(parsed.input, parsed.output)
    except OSError as error:
        complain(f"config: {error.filename}: {error.strerror}")
        return EXIT_CODES["config"]
    except ValueError as error:
        complain(f"config: {error}")
        return EXIT_CODES["config"]
    from server.cli.batch_work import work

    return work(loaded, parsed)


def _check_files(source: Path, target: Path) -> None:
    """Raises OSError and ValueError for what cannot be read, and for an output that would overwrite the input."""
    with source.open("rb"):
        pass
    if not source.is_file():
        raise ValueError(f"{source} is no regular file, and is read more than once; write the requests to a file")
    if target.exists():
        if not target.is_file():
            raise ValueError(f"{target} is no regular file; answers are read again to go on: name a file")
        if os.path.samefile(source, target):
            raise ValueError(f"{source} is both the input and the output; name another file for the answers")


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 100_000):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 100,000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds
