"""`python -m engine.training JOB`: trains heads as a file says that `peregrine train-heads` has written.

A second run of the same job goes on where the first was interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.ipc.messages import EXIT_CODES
from engine.training.heads_job import HeadsJob
from engine.training.heads_run import run

INTERRUPTED = 130  # as shells say it of Ctrl-C


def main(arguments: list[str]) -> int:
    """0, or the exit code of what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m engine.training", description=__doc__)
    parser.add_argument("job", type=Path, help="what is to be trained, as JSON")
    job = HeadsJob.model_validate_json(parser.parse_args(arguments).job.read_text(encoding="utf-8"))
    try:
        accuracy = run(job, lambda text: print(text, file=sys.stderr, flush=True))
    except ValueError as error:
        kind = str(getattr(error, "kind", "config"))
        print(f"peregrine: {kind}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CODES[kind]
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    print(accuracy.table())
    print(f"the heads are in {job.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
