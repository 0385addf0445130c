"""A folder with a config and nothing else: the shape of a model, for random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtest.gpu.shapes import Shape


@contextmanager
def model_folder(shape: Shape, *, max_length: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        shape.write_config(Path(folder), max_length=max_length)
        yield Path(folder)
