"""Every weight as the library that owns its layout dequantises it. `oracles/make_fixtures.py` made the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from engine.loading.quantized.checkpoint import read_quantized
from engine.loading.quantized.scheme import Scheme
from engine.loading.stored_weights import StoredTensor, read_stored_weights
from engine.quantization.stored_levels import StoredLevels

FILES = sorted(Path(__file__).with_name("oracles").glob("*.safetensors"))


def cases() -> list[tuple[Path, str]]:
    found = []
    for file in FILES:
        with safe_open(file, "pt") as opened:
            found += [(file, case) for case in json.loads(opened.metadata()["configs"])]
    return found


def test_there_are_files_of_each_library() -> None:
    assert {file.stem for file in FILES} >= {"compressed-tensors", "bitsandbytes", "gptqmodel"}


@pytest.mark.parametrize(("file", "case"), cases(), ids=[f"{file.stem}, {case}" for file, case in cases()])
def test_every_weight_is_as_its_library_has_it(file: Path, case: str) -> None:
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["configs"])[case]
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    dense = tensors[f"{case}/dense"]
    stored = {
        f"layer.{name.removeprefix(f'{case}/')}": tensor
        for name, tensor in read_stored_weights((file,)).items()
        if name.startswith(f"{case}/") and not name.endswith("/dense")
    }
    quantized = read_quantized(stored, Scheme(config["quant_method"], config))
    found = restored(quantized, stored, tensors)
    assert torch.equal(found.dense(0, found.shape[0]).to(dense.dtype), dense)


def restored(quantized, stored: dict[str, StoredTensor], tensors: dict[str, Tensor]) -> StoredLevels:
    header = quantized.matrices["layer.weight"]
    matrix: StoredLevels = header.read({key: tensors[tensor.name] for key, tensor in header.tensors.items()})
    assert matrix.shape == header.shape
    return matrix
