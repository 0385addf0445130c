"""The directory of files that outlive the program: crash reports and recorded steps."""

from __future__ import annotations

import logging
import os
import time
from itertools import chain, count
from pathlib import Path

logger = logging.getLogger(__name__)


def state_directory() -> Path:
    """The directory of files that outlive the program: $XDG_STATE_HOME/peregrine, by default under ~/.local/state.

    Raises FileNotFoundError for a user without a home directory, as some clusters make them.
    """
    try:
        home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error
    return Path(home) / "peregrine"


def running_step_file(pid: int | None = None) -> Path | None:
    """Where an engine process keeps the inputs of its step, if it is asked to (`supervision.record_steps`).

    pid: of that process, this one by default. None where there is no directory for it.
    """
    try:
        return state_directory() / "steps" / f"{os.getpid() if pid is None else pid}.step"
    except FileNotFoundError:
        return None


def keep_running_step(pid: int) -> Path | None:
    """The inputs of the step that a process ended in, under a name that no other step will take. None: it left
    none."""
    path = running_step_file(pid)
    try:
        if path is None or not path.exists():
            return None
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{path.stem}"
        names = chain([stem], (f"{stem}-{number}" for number in count(2)))  # steps may fail within a second
        kept = next(name for name in map(path.with_stem, names) if not name.exists())
        return path.rename(kept)
    except OSError as error:
        logger.warning("cannot keep the recorded step %s: %s", path, error)
        return None
