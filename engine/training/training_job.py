"""What `python -m engine.training` is asked to do, as a file that the command line leaves for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from engine.config import EngineConfig

Count = Annotated[int, Field(ge=1)]


class TrainingJob(BaseModel):
    """What heads and draft models are trained with alike.

    sequences: prompts that the target answers, or texts that it reads.
    max_tokens: of an answer. num_tokens: to learn from; collecting ends with them, or with the sequences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: EngineConfig
    output: Path
    kind: Literal["answers", "texts"]
    sequences: list[list[int]]
    max_tokens: Count = 160
    num_tokens: Count = 200_000
    num_epochs: Count = 3
    seed: int = 0

    @property
    def data(self) -> Path:
        """Where the target's answers are kept."""
        return self.output / "training" / "data"

    @property
    def state(self) -> Path:
        """Where training goes on after it was interrupted."""
        return self.output / "training" / "state.pt"

    def write(self) -> Path:
        """Puts the job where its results will be, and returns the file. ValueError where it is another one's place."""
        folder = self.output / "training"
        file = folder / "job.json"
        content = self.model_dump_json()
        if file.is_file() and file.read_text(encoding="utf-8") != content:
            raise ValueError(f"{folder} has the work of another training; give another --output, or delete that folder")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
        return file


class HeadsJob(TrainingJob):
    """num_known_tokens: the most frequent of them, which heads guess among. markov_rank: 0 is no correction.

    batch_size: positions
    """

    drafter: Literal["heads"] = "heads"
    num_heads: Annotated[int, Field(ge=1, le=16)] = 3
    num_known_tokens: Count = 4096
    markov_rank: Annotated[int, Field(ge=0, le=1024)] = 64
    batch_size: Count = 256
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-3


class DraftJob(TrainingJob):
    """num_layers: of the target's, that are kept; None: a quarter. batch_size: sequences"""

    drafter: Literal["draft"] = "draft"
    num_layers: Count | None = None
    batch_size: Count = 8
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-4


_JOBS: TypeAdapter[HeadsJob | DraftJob] = TypeAdapter(Annotated[HeadsJob | DraftJob, Field(discriminator="drafter")])


def read_job(file: Path) -> HeadsJob | DraftJob:
    return _JOBS.validate_json(file.read_text(encoding="utf-8"))
