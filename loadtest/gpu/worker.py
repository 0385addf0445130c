"""One process of a section: runs its share of the jobs and sends what they find to the process that watches it."""

from __future__ import annotations

import os
import sys
import traceback
from io import TextIOWrapper
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from loadtest.gpu.context import Context
from loadtest.gpu.records import Begun, Problem, Record
from loadtest.gpu.sections import Section, jobs_of

MORE = 75  # exit code: one job is done, and the next one wants a process of its own
UNUSABLE = 76  # exit code: the device answers no more, which a new process mends


class Share(msgspec.Struct, frozen=True):
    """Which jobs of a section: every `num_parts`th from `part`, but the first `num_done` of those."""

    part: int
    num_parts: int
    num_done: int = 0


def work(section: Section, context: Context, share: Share, watcher: Connection, log: Path) -> None:
    """The main function of the process. What it prints goes into the section's log."""
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    assert isinstance(sys.stdout, TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # so that the last words of one that dies are there
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update(environment(is_rehearsal=context.is_rehearsal, num_workers=share.num_parts))

    def send(record: Record) -> None:
        watcher.send_bytes(msgspec.json.encode(record))

    jobs = jobs_of(section, context)[share.part :: share.num_parts][share.num_done :]
    is_fresh = section.is_fresh and not context.is_rehearsal  # without a device there is none of its memory to free
    for number, job in enumerate(jobs):
        send(Begun(job.name))
        try:
            for record in job.run():
                send(record)
        except Exception as error:  # whatever it was, the other jobs can still say something
            send(Problem(job.name, _in_words(error)))
            if not _is_usable(context):
                os._exit(UNUSABLE)
        if is_fresh and number + 1 < len(jobs):
            os._exit(MORE)


def environment(*, is_rehearsal: bool, num_workers: int) -> dict[str, str]:
    """Fused multiply-adds are what the kernels were compiled and checked with. Processes at once share the cores."""
    variables = {"TRITON_DEFAULT_FP_FUSION": "1", "HF_HUB_OFFLINE": "1"}
    if is_rehearsal:
        return variables | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if num_workers > 1:
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_workers))
    return variables


def _in_words(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line[:300]} ({Path(place.filename).name}:{place.lineno})"


def _is_usable(context: Context) -> bool:
    """Whether the device still works: after an illegal access, every later call fails."""
    if context.is_rehearsal:
        return True
    import torch

    try:
        torch.zeros(1, device=context.device).item()
    except RuntimeError:
        return False
    return True
