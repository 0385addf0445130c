"""The optional extra `loadtest`, which serving does not need: tabulate for tables, matplotlib for plots."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def check_extra(*modules: str) -> None:
    """Ends the program with one line and status 2, before anything is measured, if a module is not there."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        install = f"{sys.executable} -m pip install 'peregrine[loadtest]' (in a checkout: -e '.[loadtest]')"
        print(f"loadtest needs {' and '.join(missing)}, of an optional extra; install it: {install}", file=sys.stderr)
        sys.exit(2)
