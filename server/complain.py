"""How a command ends that could not do its work. Imports nothing: the engine's start must not wait for the server's."""

from __future__ import annotations

import sys


def complain(message: str) -> None:
    """The last line of a command that failed: one line, whatever is in it."""
    sys.stdout.flush()
    print("peregrine: " + " ".join(message.split()), file=sys.stderr, flush=True)
