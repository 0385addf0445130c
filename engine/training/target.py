"""The model whose tokens are to be guessed, while it answers prompts and says what it would have said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from engine.build import build_engine
from engine.ipc.messages import ModelInfo
from engine.models.model import Decoder
from engine.runner.executor import ModelExecutor
from engine.training.collector import Collector
from engine.training.training_job import TrainingJob
from engine.training.transcripts import TranscriptFolder, Transcripts

Say = Callable[[str], None]
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Target:
    """What is known of the model whose tokens are to be guessed. dtype: of its hidden states"""

    hidden_size: int
    vocab_size: int
    decoder: Decoder
    dtype: torch.dtype = torch.float32

    @torch.inference_mode()
    def output_rows(self, token_ids: Tensor | None) -> Tensor:
        """Rows of its output matrix: its logits of unit vectors, so whatever keeps the matrix need not be known.

        [n, hidden_size] float32, scaled and soft-capped as the logits are
        """
        unit = torch.eye(self.hidden_size, dtype=self.dtype)
        parts = []
        for start in range(0, self.hidden_size, _ROWS_AT_ONCE):
            columns = self.decoder.compute_logits(unit[start : start + _ROWS_AT_ONCE])
            parts.append((columns if token_ids is None else columns[:, token_ids]).float().clone())
        return torch.cat(parts).T.contiguous()


def open_target(job: TrainingJob, say: Say) -> tuple[Target, Collector, ModelInfo]:
    """ValueError for what the user can mend, as `build_engine` raises it."""
    engine, model = build_engine(job.engine, lambda phase, detail: say(f"{phase}: {detail}" if detail else phase))
    assert isinstance(engine.executor, ModelExecutor)
    decoder = engine.executor.runner.model
    num_at_once = number_of(model, "scheduler.max_num_seqs")
    dtype = getattr(torch, str(model.settings["model.dtype"].value))
    target = Target(decoder.hidden_size, decoder.vocab_size, decoder, dtype)
    collector = Collector(
        engine, hidden_size=decoder.hidden_size, max_model_len=model.max_model_len, num_at_once=num_at_once
    )
    return target, collector, model


def number_of(model: ModelInfo, setting: str) -> int:
    value = model.settings[setting].value
    assert isinstance(value, int)
    return value


def collect(job: TrainingJob, collector: Collector, eos_token_ids: list[int]) -> Transcripts:
    """What the target says, as far as it has not been collected yet, and all of it."""
    folder = TranscriptFolder(job.data)
    with torch.inference_mode():
        _collect(job, folder, collector, eos_token_ids)
        return folder.read()


def _collect(job: TrainingJob, folder: TranscriptFolder, collector: Collector, eos_token_ids: list[int]) -> None:
    done, num_tokens = folder.indices(), folder.num_tokens()
    if num_tokens >= job.num_tokens:
        return
    pending = ((index, ids) for index, ids in enumerate(job.sequences) if index not in done)
    if job.kind == "answers":
        transcripts = collector.answers(pending, eos_token_ids=eos_token_ids, max_tokens=job.max_tokens)
    else:
        transcripts = collector.texts(pending)
    with tqdm(total=job.num_tokens, initial=num_tokens, desc=job.kind, unit="token", disable=None) as bar:
        try:
            for transcript in transcripts:
                folder.add(transcript)
                bar.update(len(transcript.tokens))
                num_tokens += len(transcript.tokens)
                if num_tokens >= job.num_tokens:
                    break
        finally:  # also where it is interrupted
            folder.flush()
