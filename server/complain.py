"""How commands end: with an error line, or silently when the reader of their output has left.

Imports nothing of ours: the engine's start must not wait for the server's.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable

READER_LEFT = 128 + signal.SIGPIPE  # the exit code that a shell gives to a command which SIGPIPE ended


def complain(message: str) -> None:
    """Writes the error of a command that failed, as one line. It is lost where it cannot be written."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print("peregrine: " + " ".join(message.split()), file=sys.stderr, flush=True)


def until_the_reader_leaves(command: Callable[[], int]) -> int:
    """Runs a command, and writes out what it printed. Ends it silently where a pipe that it prints to is closed.

    SIGPIPE's default action would do so too, but it would also end a server whose client disconnects.
    """
    try:
        try:
            exit_code = command()
        except SystemExit as ending:  # argparse's way to end after it has printed
            exit_code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BrokenPipeError:
        if not _discard_output():
            raise
        return READER_LEFT
    return exit_code


def print_all(page: str) -> int:
    """Runs a command that prints `page` as it is, without a line end of its own."""

    def command() -> int:
        print(page, end="")
        return 0

    return until_the_reader_leaves(command)


def _discard_output() -> bool:
    """Whether an output of the process has lost its reader. Points it to /dev/null: it is flushed at exit."""
    broken = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and _has_no_reader(stream.fileno())]
    for stream in broken:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return bool(broken)


def _has_no_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
