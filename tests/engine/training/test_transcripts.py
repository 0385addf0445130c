"""Files of transcripts: whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.training import transcripts
from engine.training.transcripts import Transcript, TranscriptFolder, to_half


def make(index: int, length: int) -> Transcript:
    return Transcript(index, torch.arange(length).int() + index, torch.full((length, 4), float(index)).half())


def test_what_is_added_is_read_in_any_number_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcripts, "_TOKENS_PER_FILE", 10)
    folder = TranscriptFolder(tmp_path)
    for index, length in ((3, 4), (1, 7), (2, 2)):
        folder.add(make(index, length))
    assert (folder.indices(), folder.num_tokens(), len(folder.files())) == ({3, 1}, 11, 1)
    folder.flush()
    folder = TranscriptFolder(tmp_path)
    assert (folder.indices(), folder.num_tokens(), len(folder.files())) == ({1, 2, 3}, 13, 2)
    read = folder.read()
    assert read.indices.tolist() == [3, 1, 2]
    assert read.lengths.tolist() == [4, 7, 2]
    assert read.tokens.tolist() == [3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7, 2, 3]
    assert read.states[:, 0].tolist() == [3.0] * 4 + [1.0] * 7 + [2.0] * 2


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = TranscriptFolder(tmp_path)
    folder.add(make(0, 5))
    folder.flush()
    [file] = folder.files()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"transcripts-00000.safetensors is damaged .* delete it"):
        folder.read()


def test_nothing_to_learn_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no transcripts to learn from"):
        TranscriptFolder(tmp_path).read()


def test_states_beyond_half_precision_stay_finite() -> None:
    assert to_half(torch.tensor([1e9, -1e9, 0.5])).tolist() == [65504.0, -65504.0, 0.5]
