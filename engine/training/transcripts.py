"""What the target said, and the hidden state that it said each token from: kept in files, some sequences in each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_TOKENS_PER_FILE = 4096
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class Transcript:
    """One sequence. index: of the job's sequences

    tokens: [n] int32. states: [n, hidden_size] float16, the one that each token was sampled or is read from
    """

    index: int
    tokens: Tensor
    states: Tensor


@dataclass(frozen=True, slots=True)
class Transcripts:
    """All of them, one after the other. indices, lengths: of each sequence"""

    indices: Tensor  # [num_sequences] int64
    lengths: Tensor  # [num_sequences] int64
    tokens: Tensor  # [num_tokens] int32
    states: Tensor  # [num_tokens, hidden_size] float16


def to_half(states: Tensor) -> Tensor:
    """States as they are kept: within a two-thousandth, which is less than what heads could make use of."""
    return states.float().clamp(-_LARGEST, _LARGEST).to("cpu", torch.float16)


class TranscriptFolder:
    """Files that are whole, or not there: a run that was killed loses what was not written yet, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: list[Transcript] = []
        folder.mkdir(parents=True, exist_ok=True)

    def files(self) -> list[Path]:
        return sorted(self._folder.glob("transcripts-*.safetensors"))

    def indices(self) -> set[int]:
        """Sequences that are there already."""
        found = [self._load(file)["indices"] for file in self.files()]
        return {index for indices in found for index in indices.tolist()}

    def num_tokens(self) -> int:
        return sum(int(self._load(file)["lengths"].sum()) for file in self.files())

    def add(self, transcript: Transcript) -> None:
        """Writes a file as soon as there is enough to fill it."""
        self._waiting.append(transcript)
        if sum(len(one.tokens) for one in self._waiting) >= _TOKENS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Writes what is left."""
        if self._waiting:
            self._write(self._waiting)
            self._waiting = []

    def read(self) -> Transcripts:
        """All of them, in the order of their indices within each file."""
        parts = [self._load(file) for file in self.files()]
        if not parts:
            raise ValueError(f"{self._folder} has no transcripts to learn from; give longer texts or more of them")
        joined = {name: torch.cat([part.pop(name) for part in parts]) for name in ("indices", "lengths", "tokens")}
        states = torch.empty(len(joined["tokens"]), parts[0]["states"].shape[1], dtype=torch.float16)
        start = 0
        for part in parts:  # each is let go when it is copied: together they may be gigabytes
            rows = part.pop("states")
            states[start : start + len(rows)] = rows
            start += len(rows)
        return Transcripts(joined["indices"].long(), joined["lengths"].long(), joined["tokens"], states)

    def _write(self, transcripts: list[Transcript]) -> None:
        tensors = {
            "indices": torch.tensor([one.index for one in transcripts], dtype=torch.int64),
            "lengths": torch.tensor([len(one.tokens) for one in transcripts], dtype=torch.int64),
            "tokens": torch.cat([one.tokens for one in transcripts]),
            "states": torch.cat([one.states for one in transcripts]),
        }
        name = f"transcripts-{len(self.files()):05}.safetensors"
        partial = self._folder / f".{name}"
        save_file(tensors, partial)
        partial.replace(self._folder / name)

    @staticmethod
    def _load(file: Path) -> dict[str, Tensor]:
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it, and what it held is made again") from error
