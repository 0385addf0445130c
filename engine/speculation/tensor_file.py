"""The tensors of a drafter's checkpoint, by name: safetensors, or a pickle that holds nothing else."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 1 << 27


class TensorFile(Protocol):
    """Tensors by name, whose shapes are known before they are read."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


def drafter_error(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: {reason}; check what speculation.model names, or download it again")


def open_tensor_file(path: Path, names: tuple[str, ...]) -> TensorFile:
    """A file, or in a directory the first of these names that is there, else its model.safetensors, whole or in parts.

    ValueError, with what to do, where there is none, or none that can be read.
    """
    files = [path] if path.is_file() else _files_of(path, (*names, _WHOLE))
    if files[0].suffix == ".safetensors":
        return _SafetensorsFiles(files)
    if files[0].suffix in (".pt", ".pth", ".bin"):
        return _PickledFile(files[0])
    raise ValueError(f"{files[0]} is neither a .safetensors nor a .pt file, and drafters are read from those alone")


def _files_of(directory: Path, names: tuple[str, ...]) -> list[Path]:
    for name in names:
        if (directory / name).is_file():
            return [directory / name]
    if (directory / _INDEX).is_file():
        shards = _read_json(directory / _INDEX).get("weight_map")
        parts = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not parts or any(Path(part).name != part for part in parts):
            raise ValueError(f"{directory / _INDEX} does not map weights to files beside it; download it again")
        return [directory / part for part in parts]
    raise ValueError(
        f"{directory} has no drafter: none of {', '.join(names)} is there; name the directory that they lie in"
    )


class _SafetensorsFiles:
    def __init__(self, files: list[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  # no mapping
                        self._file_of[name] = file
                        self._shapes[name] = tuple(tensors.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is missing, cut short or damaged ({error}); download it again") from error

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor


class _PickledFile:
    """A .pt file, read by torch's reader of tensors alone, which runs no code: whatever else is in it is refused."""

    def __init__(self, file: Path) -> None:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # border: the reader raises whatever a broken file makes it stumble over
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(
                f"{file} is no file of tensors alone ({reason[:200]}); what else a pickle holds could run code, so it "
                "is not read: download it again, or convert it to safetensors"
            ) from error
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
            for name, tensor in content.items()
        ):
            raise ValueError(f"{file} holds other things than tensors by name; convert it to safetensors")
        self._tensors: dict[str, Tensor] = content

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def read_config(path: Path) -> Mapping[str, object]:
    """config.json of a directory, or beside a file; empty where there is none, since files of 2023 came without."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    return _read_json(file) if file.is_file() else {}


def _read_json(file: Path) -> Mapping[str, object]:
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has {file.stat().st_size:,} bytes")
        content: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}; download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__} where an object of JSON should be; download it again")
    return content
