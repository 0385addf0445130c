"""`python -m engine.training JOB`: trains a drafter as a file says that `peregrine train-heads` has written.

A second run of the same job goes on where the first was interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.ipc.messages import EXIT_CODES
from engine.training.draft_run import run_draft
from engine.training.heads_run import run
from engine.training.training_job import DraftJob, read_job

INTERRUPTED = 130  # as shells say it of Ctrl-C


def main(arguments: list[str]) -> int:
    """0, or the exit code of what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m engine.training", description=__doc__)
    parser.add_argument("job", type=Path, help="what is to be trained, as JSON")
    job = read_job(parser.parse_args(arguments).job)
    try:
        accuracy = run_draft(job, _say) if isinstance(job, DraftJob) else run(job, _say)
    except ValueError as error:
        kind = str(getattr(error, "kind", "config"))
        print(f"peregrine: {kind}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CODES[kind]
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    print(accuracy.table())
    print(f"the {'draft model is' if isinstance(job, DraftJob) else 'heads are'} in {job.output}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
