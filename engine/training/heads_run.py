"""The stages of training heads: collect what the target says, learn from it, measure, write."""

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
from engine.speculation.medusa_heads import MedusaHeads
from engine.training.collector import Collector
from engine.training.heads_accuracy import HeadsAccuracy, measure_accuracy
from engine.training.heads_data import HeadsData, frequent_tokens, make_data
from engine.training.heads_job import HeadsJob
from engine.training.heads_trainer import HeadsTrainer
from engine.training.trainable_heads import TrainableHeads
from engine.training.transcripts import TranscriptFolder

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


def run(job: HeadsJob, say: Say) -> HeadsAccuracy:
    """Writes heads into `job.output`. What an earlier run of the same job has done is not done again.

    ValueError for what the user can mend, as `build_engine` raises it.
    """
    target, collector, model = _build(job, say)
    folder = TranscriptFolder(job.data)
    with torch.inference_mode():
        _collect(job, folder, collector, model.eos_token_ids)
        transcripts = folder.read()
        known = frequent_tokens(transcripts, count=job.num_known_tokens, vocab_size=target.vocab_size)
        output = target.output_rows(known)
    output = output.clone()  # no tensor of inference
    torch.set_num_threads(_number(model, "device.num_threads"))  # of which compiled layers had left it one
    data = make_data(transcripts, known.clone(), output, vocab_size=target.vocab_size)
    if not len(data.learned) or not len(data.held_out):
        raise ValueError(f"{len(transcripts.lengths)} sequences are too few to learn from; give more text, or prompts")
    say(f"learning from {len(data.learned):,} tokens of {len(transcripts.lengths):,} sequences")
    heads = _train(job, data, output)
    return _write(job, heads, data, target)


def _build(job: HeadsJob, say: Say) -> tuple[Target, Collector, ModelInfo]:
    engine, model = build_engine(job.engine, lambda phase, detail: say(f"{phase}: {detail}" if detail else phase))
    assert isinstance(engine.executor, ModelExecutor)
    decoder = engine.executor.runner.model
    num_at_once = _number(model, "scheduler.max_num_seqs")
    dtype = getattr(torch, str(model.settings["model.dtype"].value))
    target = Target(decoder.hidden_size, decoder.vocab_size, decoder, dtype)
    collector = Collector(
        engine, hidden_size=decoder.hidden_size, max_model_len=model.max_model_len, num_at_once=num_at_once
    )
    return target, collector, model


def _number(model: ModelInfo, setting: str) -> int:
    value = model.settings[setting].value
    assert isinstance(value, int)
    return value


def _collect(job: HeadsJob, folder: TranscriptFolder, collector: Collector, eos_token_ids: list[int]) -> None:
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


def _train(job: HeadsJob, data: HeadsData, output: Tensor) -> TrainableHeads:
    torch.manual_seed(job.seed)
    heads = TrainableHeads(output, num_heads=job.num_heads, markov_rank=job.markov_rank)
    trainer = HeadsTrainer(
        heads,
        data,
        batch_size=job.batch_size,
        num_epochs=job.num_epochs,
        learning_rate=job.learning_rate,
        seed=job.seed,
    )
    trainer.train(job.state)
    return heads


def _write(job: HeadsJob, heads: TrainableHeads, data: HeadsData, target: Target) -> HeadsAccuracy:
    """Writes the heads, reads them as a proposer will, and writes how good those are into their config."""
    sizes = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    fields: dict[str, object] = {"base_model_name_or_path": job.engine.model.path}
    heads.save(job.output, known=data.known, vocab_size=target.vocab_size, fields=fields)
    written = MedusaHeads.load(job.output, **sizes, output_rows=target.output_rows)
    accuracy = measure_accuracy(written, data)
    fields["peregrine_accuracies"] = accuracy.by_rank
    heads.save(job.output, known=data.known, vocab_size=target.vocab_size, fields=fields)
    return accuracy
