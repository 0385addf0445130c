"""How a command ends that could not do its work. Imports nothing: the engine's start must not wait for the server's."""

from __future__ import annotations

import contextlib
import sys


def complain(message: str) -> None:
    """The last line of a command that failed: one line, whatever is in it. Lost where it cannot be written."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print("peregrine: " + " ".join(message.split()), file=sys.stderr, flush=True)
