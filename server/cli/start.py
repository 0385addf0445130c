"""The entry of the command `peregrine`: takes SIGTERM before anything is imported.

The kernel drops a signal that the first process of a container has no handler for, and imports take half a second: a
container that is stopped meanwhile would otherwise run until its grace period is over.
"""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Runs the command. The exit code; a server that is told to end before it listens has 0, as later."""
    if sys.argv[1:2] == ["serve"]:
        signal.signal(signal.SIGTERM, _end_at_once)  # until `server.cli.shutdown.catch_signals`
    from server.cli.main import main

    return main()


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(0)  # nothing has begun, and the engine's process dies with this one
