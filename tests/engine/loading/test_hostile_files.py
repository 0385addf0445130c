"""Files that are made to take memory or time: a sentence that says what is wrong, and little memory until then."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.config import ModelConfig
from engine.loading.loader import read_model_facts
from engine.models.model_error import ModelError
from tests.support.quantized_files import config_fields, write_tokenizer

HOLE = 1 << 40  # bytes of a file that takes no room on the disk
MOST = 64 << 20  # bytes of Python's own memory
STRING, ARRAY, BOOL = 8, 9, 7


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(num_tensors: int, num_pairs: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_pairs) + rest


def array(kind: int, length: int) -> bytes:
    return text("a") + struct.pack("<IIQ", ARRAY, kind, length)


def with_hole(path: Path, content: bytes, size: int = HOLE) -> Path:
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(size)
    return path


GGUFS = {
    "tensors without end": (gguf(1 << 30, 0), "announces 1,073,741,824 items"),
    "pairs without end": (gguf(0, (1 << 63) + 1), "announces 9,223,372,036,854,775,809 items"),
    "a list without end": (gguf(0, 1, array(BOOL, 1 << 36)), "announces 68,719,476,737 items"),
    "lists that add up": (gguf(0, 9, (array(BOOL, 1 << 20) + bytes(1 << 20)) * 9), r"announces 4,19\d,\d+ items"),
    "a text without end": (gguf(0, 1, text("a") + struct.pack("<IQ", STRING, 1 << 35)), "past 268,435,456 bytes"),
    "a key without end": (gguf(0, 1, struct.pack("<Q", 1 << 39)), "past 268,435,456 bytes"),
    "a text among others": (gguf(0, 1, array(STRING, 3) + text("b") + struct.pack("<Q", 1 << 33)), "inside a list"),
    "lists in lists": (gguf(0, 1, array(ARRAY, 5)), "an array of type 9"),
    "dimensions without end": (gguf(1, 0, text("t") + struct.pack("<I", 1 << 20)), "1048576 dimensions"),
    "a tensor beyond all numbers": (
        gguf(1, 0, text("t") + struct.pack("<I4QIQ", 4, *[1 << 60] * 4, 0, 0)), "is cut short: tensor 't' ends at",
    ),
    "an offset beyond all numbers": (
        gguf(1, 0, text("t") + struct.pack("<IQIQ", 1, 32, 2, (1 << 64) - 32)), "is cut short: tensor 't' ends at",
    ),
    "a row that is no whole block": (
        gguf(1, 0, text("t") + struct.pack("<I2QIQ", 2, 31, 4, 2, 0)), r"has shape \(4, 31\), impossible for Q4_0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUFS)
def test_a_gguf_that_lies_about_its_size_is_refused(tmp_path: Path, name: str) -> None:
    content, reason = GGUFS[name]
    path = with_hole(tmp_path / "m.gguf", content)
    with little_memory(), pytest.raises(ModelError, match=reason):
        read_model_facts(ModelConfig(path=str(path)))


def directory(path: Path, header: bytes, size: int | None = None) -> Path:
    """A checkpoint whose one file has such a header, its length included."""
    (path / "config.json").write_text(json.dumps(config_fields()))
    write_tokenizer(path)
    with_hole(path / "model.safetensors", header, len(header) if size is None else size)
    return path


def named(entries: dict[str, object], length: int | None = None) -> bytes:
    content = json.dumps(entries).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content


def tensor(dtype: str = "F32", shape: list[int] | None = None, ends: tuple[int, int] = (0, 4)) -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": list(ends)}}


SAFETENSORS = {
    "a header of 2 GB": (named({}, 2 << 30), 3 << 30, "a header of 2,147,483,648 bytes"),
    "a header beyond all numbers": (named({}, (1 << 64) - 1), None, "a header of 18,446,744,073,709,551,615 bytes"),
    "a header longer than the file": (named({}, 1 << 20), None, "is cut short or damaged"),
    "no header": (b"", None, "is cut short or damaged"),
    "half a length": (b"\1\2\3", None, "is cut short or damaged"),
    "nesting without end": (struct.pack("<Q", 1 << 20) + b"[" * (1 << 20), None, "is cut short or damaged"),
    "no JSON": (struct.pack("<Q", 4) + b"\xff\xfe{}", None, "is cut short or damaged"),
    "a shape beyond all numbers": (named(tensor(shape=[1 << 62, 1 << 62])), HOLE, "is cut short or damaged"),
    "a tensor that is not there": (named(tensor(ends=(0, 1 << 50), shape=[1 << 48])), HOLE, "is cut short or damaged"),
    "a tensor that ends before it begins": (named(tensor(ends=(8, 4))), None, "is cut short or damaged"),
    "a dtype that is not known": (named(tensor("Q4")), None, "is cut short or damaged"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_safetensors_file_that_lies_about_its_size_is_refused(tmp_path: Path, name: str) -> None:
    header, size, reason = SAFETENSORS[name]
    path = directory(tmp_path, header, size)
    with little_memory(), pytest.raises(ModelError, match=reason):
        read_model_facts(ModelConfig(path=str(path)))
