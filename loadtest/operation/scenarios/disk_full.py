"""The disk that takes the log, recorded steps and crash reports is full, under load, and the engine dies: all goes on.

A small file system is mounted for it, which takes the rights of root.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loadtest.operation.disturbance import check_afterwards, check_all_answered, disturb, warmed_up
from loadtest.operation.stage import Stage

SIZE = 4 << 20  # bytes of the disk
PATIENCE = 90.0  # seconds


async def run(stage: Stage) -> None:
    with _small_disk(stage.folder / "disk") as disk:
        settings = ("supervision.record_steps=contents", "supervision.max_deaths=20")
        async with stage.serve(*settings, folder=disk, environment={"TMPDIR": str(disk)}) as served:
            crowd = stage.crowd(served)
            before = await warmed_up(stage, served, crowd)

            async def fill() -> None:
                _fill(disk / "filling")
                for number in (1, 2):
                    await served.replace_engine(number, patience=PATIENCE, what="the engine is back on a full disk")
                free = os.statvfs(disk).f_bavail
                stage.findings.check("the disk was full all the time", free == 0, f"{free} free blocks")
                (disk / "filling").unlink()

            account = await disturb(crowd, fill, at_least=stage.seconds(15))
            check_all_answered(stage, account)
            await check_afterwards(stage, served, crowd, before)


@contextmanager
def _small_disk(place: Path) -> Iterator[Path]:
    """A file system of SIZE bytes. Raises RuntimeError where it cannot be mounted."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        raise RuntimeError(f"a small disk cannot be mounted, which needs root on Linux: {reason.strip()}") from error
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False, capture_output=True)


def _fill(file: Path) -> None:
    """Writes until there is no room, to the last byte."""
    with file.open("wb", buffering=0) as target:
        for size in (65536, 512, 1):
            with suppress(OSError):
                while True:
                    target.write(bytes(size))
