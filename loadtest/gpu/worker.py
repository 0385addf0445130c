"""One process of a section: runs its share of the jobs and appends what they find to a file."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

from loadtest.gpu import records
from loadtest.gpu.context import Context, Job, read_context
from loadtest.gpu.records import Begun, Problem

MORE = 75  # exit code: one job is done, and the next one wants a process of its own
UNUSABLE = 76  # exit code: the device answers no more, which a new process mends


def work(jobs: list[Job], context: Context, output: Path, *, is_fresh: bool) -> int:
    """Runs the jobs one after the other, or only the first. Returns the exit code."""
    for number, job in enumerate(jobs):
        records.append(output, Begun(job.name))
        try:
            for record in job.run():
                records.append(output, record)
        except Exception as error:  # whatever it was, the other jobs can still say something
            records.append(output, Problem(job.name, _in_words(error)))
            if not _is_usable(context):
                return UNUSABLE
        if is_fresh and number + 1 < len(jobs):
            return MORE
    return 0


def _in_words(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line[:300]} ({Path(place.filename).name}:{place.lineno})"


def _is_usable(context: Context) -> bool:
    """An illegal access leaves every later call failing."""
    if context.is_rehearsal:
        return True
    import torch

    try:
        torch.zeros(1, device=context.device).item()
    except RuntimeError:
        return False
    return True


def main(arguments: list[str]) -> int:
    """module, fresh or shared, context, output, which part of how many, how many jobs of it are done"""
    module, kind, path, output, part, num_parts, num_done = arguments
    context = read_context(Path(path))
    jobs: list[Job] = importlib.import_module(module).jobs(context)
    mine = jobs[int(part) :: int(num_parts)][int(num_done) :]
    return work(mine, context, Path(output), is_fresh=kind == "fresh")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
