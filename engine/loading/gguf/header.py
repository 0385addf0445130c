"""Reads the header of a GGUF file: metadata and where each tensor lies.

The format is ggml's docs/gguf.md, versions 2 and 3: magic, version, counts, key-value pairs, tensor infos, padding,
tensor data. Parsed here and not by `gguf.GGUFReader`, which makes several arrays per vocabulary entry and takes seconds
on what takes a tenth of one.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.models.model_error import ModelError

Scalar: TypeAlias = str | int | float | bool
MetadataValue: TypeAlias = Scalar | list[Scalar]

_STRING, _ARRAY = 8, 9
_SCALARS = {  # GGUF value type: struct format
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_MAX_DIMS = 4  # of ggml
_DEFAULT_ALIGNMENT = 32  # bytes
_MAX_BYTES = 1 << 28  # of a header: half a million tokens and their merges take 30 MB
_MAX_ITEMS = 1 << 22  # of all its lists together, and of its pairs and tensors


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. `shape` is in torch's order; `offset` counts bytes from the start of that file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    path: Path
    metadata: dict[str, MetadataValue]
    tensors: dict[str, TensorInfo]
    data_start: int  # bytes from the file's start
    file_size: int  # bytes

    @property
    def architecture(self) -> str:
        return self.string("general.architecture")

    def string(self, key: str) -> str:
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise ModelError(f"{self.path}: the header has no text under {key!r}; the file is not a language model")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # some writers give one value per layer
        if not isinstance(value, int):
            raise ModelError(f"{self.path}: the header's {key!r} is {_brief(value)}, but one whole number is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(key, default)
        if not isinstance(value, int | float):
            raise ModelError(f"{self.path}: the header's {key!r} is {_brief(value)}, but a number is needed")
        return float(value)

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ModelError(f"{self.path}: the header has no list of texts under {key!r}")
        return [item for item in value if isinstance(item, str)]

    def numbers(self, key: str) -> list[float]:
        value = self.metadata.get(key)
        if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
            raise ModelError(f"{self.path}: the header has no list of numbers under {key!r}")
        return [item for item in value if isinstance(item, int | float)]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Parses and checks everything but the tensors' bytes. ModelError for files that are not whole or not GGUF.

    One file may have no tensors: the first part of a set may only describe the model (`.split_files`).
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}; check its name and permissions") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: the header has a text that is not UTF-8; the file is damaged") from error
    except ModelError:
        raise
    except ValueError as error:  # mmap of an empty file
        raise ModelError(f"{path} is empty; download it again") from error


def _parse(path: Path, data: mmap.mmap) -> GGUFHeader:
    cursor = _Cursor(path, data)
    if cursor.take(4) != b"GGUF":
        raise ModelError(f"{path} does not start with 'GGUF'; it is another kind of file, or an unfinished download")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ModelError(f"{path} is GGUF version {version}; 2 and 3, little-endian, are supported: convert it again")
    num_tensors, num_pairs = cursor.count("Q", 24), cursor.count("Q", 12)
    metadata: dict[str, MetadataValue] = {}
    for _ in range(num_pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos = [cursor.tensor_info() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ModelError(f"{path}: general.alignment is {_brief(alignment)}; the file is damaged")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {info[0]: _tensor(path, info, data_start, len(data)) for info in infos}
    return GGUFHeader(path, metadata, tensors, data_start, len(data))


def _tensor(path: Path, info: tuple[str, tuple[int, ...], int, int], data_start: int, file_size: int) -> TensorInfo:
    name, shape, raw_type, offset = info
    try:
        quantization = GGMLQuantizationType(raw_type)
    except ValueError:
        raise ModelError(f"{path}: tensor {name!r} has type {raw_type}, which the gguf package does not know") from None
    block_elements, block_bytes = GGML_QUANT_SIZES[quantization]
    if not shape or min(shape) < 1 or shape[-1] % block_elements:
        raise ModelError(f"{path} is damaged: tensor {name!r} has shape {shape}, impossible for {quantization.name}")
    num_bytes = math.prod(shape) // block_elements * block_bytes
    end = data_start + offset + num_bytes
    if end > file_size:
        raise ModelError(
            f"{path} is cut short: tensor {name!r} ends at byte {end:,}, but the file has {file_size:,} bytes; "
            "download it again"
        )
    return TensorInfo(path, name, shape, quantization, data_start + offset, num_bytes)


class _Cursor:
    """Reads forward through the header; whatever lies past the end of the file is a ModelError.

    So is a header beyond all sizes: a file may be as large as it says, and yet hold nothing but a hole.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.position = 0
        self.num_items = 0  # that lists were said to have

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > self.size:
            raise ModelError(
                f"{self.path} is cut short or damaged: the header goes on past the file's {self.size:,} bytes; "
                "download it again"
            )
        if end > _MAX_BYTES:
            raise ModelError(
                f"{self.path}: the header goes on past {_MAX_BYTES:,} bytes, and none is that long; the file is damaged"
            )
        chunk = self.data[self.position : end]
        self.position = end
        return chunk

    def scalar(self, code: str) -> int:
        """One whole number (or any scalar read as one by the caller's choice of `code`)."""
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        assert isinstance(value, int)
        return value

    def count(self, code: str, min_bytes_each: int) -> int:
        """A number of items that must fit into what is left of the file, so that damage cannot ask for much memory."""
        value = self.scalar(code)
        if value * min_bytes_each > self.size - self.position:
            raise ModelError(f"{self.path} is cut short or damaged: it announces {value:,} items; download it again")
        self.num_items += value
        if self.num_items > _MAX_ITEMS:
            raise ModelError(
                f"{self.path}: the header announces {self.num_items:,} items, and none has more than {_MAX_ITEMS:,}; "
                "the file is damaged"
            )
        return value

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def value(self, value_type: int) -> MetadataValue:
        if value_type == _STRING:
            return self.string()
        if value_type == _ARRAY:
            return self.array()
        if value_type not in _SCALARS:
            raise ModelError(f"{self.path}: the header has a value of type {value_type}; the file is damaged")
        code = "<" + _SCALARS[value_type]
        value: Scalar = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return value

    def array(self) -> list[Scalar]:
        element_type = self.scalar("I")
        if element_type == _STRING:
            return list(self.string_array(self.count("Q", 8)))
        if element_type not in _SCALARS:
            raise ModelError(f"{self.path}: the header has an array of type {element_type}, which nothing here reads")
        width = struct.calcsize("<" + _SCALARS[element_type])
        length = self.count("Q", width)
        return list(struct.unpack(f"<{length}{_SCALARS[element_type]}", self.take(length * width)))

    def string_array(self, length: int) -> list[str]:
        """`string` in a loop, without its calls: a vocabulary and its merges have 10^5 to 10^6 texts."""
        data, position, size = self.data, self.position, self.size
        unpack = struct.Struct("<Q").unpack_from
        texts: list[str] = []
        for _ in range(length):
            start = position + 8
            position = start + unpack(data, position)[0] if start <= size else size + 1
            if position > min(size, _MAX_BYTES):
                raise ModelError(f"{self.path} is cut short or damaged inside a list of texts; download it again")
            texts.append(data[start:position].decode())
        self.position = position
        return texts

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape in torch's order, type, offset from the start of the data)."""
        name = self.string()
        num_dims = self.scalar("I")
        if num_dims > _MAX_DIMS:
            raise ModelError(f"{self.path}: tensor {name!r} has {num_dims} dimensions; the file is damaged")
        dims = tuple(self.scalar("Q") for _ in range(num_dims))
        return name, dims[::-1], self.scalar("I"), self.scalar("Q")


def _brief(value: MetadataValue | None) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
