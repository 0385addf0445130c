"""Result files: what a run measured, as JSON that the same code reads again."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from loadtest.report.environment import Environment

T = TypeVar("T")


def save_result(result: object, path: Path) -> None:
    """Writes a dataclass or struct, in place of what was there. Makes the folder.

    The file is whole at every moment: a run may be killed in the middle of this.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    partial.replace(path)


def load_result(path: Path, kind: type[T], *, origin: str) -> T:
    """Reads what `save_result` wrote. ValueError if it is no `kind`; origin: what writes such files"""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is no result of {origin}: {error}") from error


def dated_path(folder: Path, name: str, environment: Environment) -> Path:
    """DATE-NAME.json, where a result of that moment goes."""
    return folder / f"{environment.date[:19].replace(':', '').replace('T', '-')}-{name}.json"
