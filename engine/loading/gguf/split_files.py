"""A GGUF file or a set of them: large models are split into parts, of which the first describes the model.

The names of parts are a convention of the format, NAME-00001-of-00003.gguf; their headers count them too.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from engine.loading.gguf.header import GGUFHeader, read_gguf_header
from engine.models.model_error import ModelError

_PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_COUNT, _NUMBER = "split.count", "split.no"  # in the metadata; numbered from 0
_MOST_PARTS = 10_000


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """All files of the set that `path` is any part of, in their order; itself where its name is no part's.

    ModelError that names the parts that are missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= _MOST_PARTS:
        raise ModelError(f"{path} cannot be part {int(match['number'])} of {count}; give it the name that it had")
    parts = tuple(path.with_name(f"{match['name']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1))
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(f"{path} is one of {count} parts, and beside it {names} are missing; download them too")
    return parts


def read_gguf_parts(parts: tuple[Path, ...]) -> GGUFHeader:
    """The header of the first part, with the tensors of all. ModelError where they do not belong together."""
    headers = [read_gguf_header(part) for part in parts]
    for number, header in enumerate(headers):
        found = header.metadata.get(_NUMBER, 0), header.metadata.get(_COUNT, 1)
        if found[1] in (0, 1) and len(parts) == 1:
            continue
        if len(parts) == 1:
            raise ModelError(
                f"{header.path} is one of {found[1]} parts, but its name does not say so; give all of them the names "
                "that they had, such as model-00001-of-00003.gguf"
            )
        if found != (number, len(parts)):
            raise ModelError(
                f"{header.path} should be part {number + 1} of {len(parts)}, but its header says {_say(found)}; it "
                "belongs to another set, or was renamed"
            )
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    if len(tensors) < sum(len(header.tensors) for header in headers):
        raise ModelError(f"{parts[0]} and its other parts hold some tensors twice; download them again")
    if not tensors:
        raise ModelError(f"{parts[0]} has no tensors; it is a vocabulary-only file or an unfinished conversion")
    return replace(headers[0], tensors=tensors)


def _say(found: tuple[object, object]) -> str:
    number, count = found
    return f"part {number + 1} of {count}" if isinstance(number, int) else f"part {number!r} of {count!r}"
