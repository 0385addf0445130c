"""GGUF files that were split into parts are the model that they were before, whichever part is named."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from engine.config import ModelConfig
from engine.loading.loader import LoadedModel, load_model, read_model_facts
from engine.models.model_error import ModelError
from tests.support import gguf_files


def load(path: Path) -> LoadedModel:
    return load_model(ModelConfig(path=str(path)), dtype=torch.float32, seed=0)


def write_parts(directory: Path, **split: int) -> list[Path]:
    directory.mkdir(exist_ok=True)
    state = gguf_files.state_of(gguf_files.make_model("llama", tied=True))
    gguf_files.write_gguf(directory / "model.gguf", "llama", state, **split)
    return sorted(directory.glob("*.gguf"))


@pytest.mark.parametrize("split", [{"split_max_tensors": 6}, {"split_max_tensors": 7, "small_first_shard": True}])
def test_any_part_names_the_set(split: dict[str, int], tmp_path: Path) -> None:
    (whole,) = write_parts(tmp_path / "whole")
    parts = write_parts(tmp_path / "parts", **split)
    assert len(parts) > 2
    expected, digests = load(whole), set()
    for part in parts:
        loaded = load(part)
        for name, parameter in loaded.model.named_parameters():
            assert torch.equal(parameter, expected.model.get_parameter(name)), name
        assert loaded.eos_token_ids == expected.eos_token_ids
        assert loaded.tokenizer == expected.tokenizer
        assert read_model_facts(ModelConfig(path=str(part))).num_parameters == expected.num_parameters
        digests.add(loaded.weights_digest)
    assert len(digests) == 1


def test_each_missing_part_is_named(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, split_max_tensors=6)
    for missing in parts:
        kept = missing.read_bytes()
        missing.unlink()
        for part in set(parts) - {missing}:
            with pytest.raises(ModelError, match=f"{missing.name} are missing; download them too"):
                load(part)
        missing.write_bytes(kept)


def test_parts_of_another_set_or_order_are_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, split_max_tensors=6)
    originals = [part.read_bytes() for part in parts]
    shuffled = originals[1:] + originals[:1]
    for part, content in zip(parts, shuffled, strict=True):
        part.write_bytes(content)
    with pytest.raises(ModelError, match="should be part 1 of"):
        load(parts[0])
    for part, content in zip(parts, originals, strict=True):
        part.write_bytes(content)
    (alone,) = write_parts(tmp_path / "whole")
    shutil.copy(alone, parts[1])
    with pytest.raises(ModelError, match="should be part 2 of"):
        load(parts[0])


def test_a_part_under_another_name_says_what_it_is(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, split_max_tensors=6)
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match=r"is one of .* parts, but its name does not say so"):
        load(renamed)
    odd = parts[1].rename(tmp_path / "m-00009-of-00003.gguf")
    with pytest.raises(ModelError, match="cannot be part 9 of 3"):
        load(odd)


def test_a_part_that_is_cut_short_is_named(tmp_path: Path) -> None:
    parts, rng = write_parts(tmp_path, split_max_tensors=6), random.Random(0)
    for part in parts:
        content = part.read_bytes()
        part.write_bytes(content[: rng.randrange(len(content) - 64)])
        with pytest.raises(ModelError, match=part.name):
            load(parts[0])
        part.write_bytes(content)
