"""The pooling that a checkpoint was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.loading.pooling_default import POOLING_FILE, read_pooling_default
from engine.loading.source import ModelSource
from engine.models.model_error import ModelError


def source_with(path: Path, content: object) -> ModelSource:
    file = path / POOLING_FILE
    file.parent.mkdir()
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return ModelSource("directory", path, ())


@pytest.mark.parametrize(
    ("content", "pooling"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8}, "mean"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_cls_token": True}, "last"),
        ({"pooling_mode": 5}, "last"),
    ],
)
def test_files_of_sentence_transformers_say_how_states_are_pooled(tmp_path, content, pooling) -> None:
    assert read_pooling_default(source_with(tmp_path, content)) == pooling


def test_where_nothing_is_said_it_is_the_last(tmp_path) -> None:
    assert read_pooling_default(ModelSource("directory", tmp_path, ())) == "last"


@pytest.mark.parametrize("content", [{"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True}, "[]", "{"])
def test_files_that_make_no_sense_are_named(tmp_path, content) -> None:
    with pytest.raises(ModelError, match="1_Pooling"):
        read_pooling_default(source_with(tmp_path, content))
