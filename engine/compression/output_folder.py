"""The folder that a checkpoint is written into: there when it is whole, and not before.

Files go to a hidden folder beside it, which gets its name in one step at the end, and is removed when something fails.
What a killed process left there is removed by the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.models.model_error import ModelError

_RESERVE = 64 << 20  # bytes of the disk that are left


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Where to write. Leaving without an error makes it `output`; with one, nothing is left.

    ModelError where `output` has something in it, or another process is writing it.
    """
    check_is_free(output)
    partial = output.parent / f".{output.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ModelError(f"{output} cannot be made: {error}; give another folder") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ModelError(f"another process is writing {output}; wait for it, or give another folder") from error
        _empty(partial)
        try:
            yield partial
            os.fsync(lock)
            check_is_free(output)
            os.replace(partial, output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def check_is_free(output: Path) -> None:
    """ModelError where something is there: a checkpoint is never written over."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise ModelError(f"{output} is there already; give another folder, or delete it first")


def check_room(folder: Path, num_bytes: int) -> None:
    """ModelError where a disk has no room for so many bytes more. folder: on it, or to be made on it"""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if num_bytes + _RESERVE > free:
        raise ModelError(
            f"{folder} will take {num_bytes / 1e9:,.1f} GB, but its disk has {free / 1e9:,.1f} GB free; give a folder "
            "on another disk"
        )


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
