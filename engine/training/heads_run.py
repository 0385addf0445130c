"""The stages of training heads: collect what the target says, learn from it, measure, write."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.speculation.medusa_heads import MedusaHeads
from engine.training.heads_accuracy import HeadsAccuracy, measure_accuracy
from engine.training.heads_data import HeadsData, frequent_tokens, make_data
from engine.training.heads_trainer import HeadsTrainer
from engine.training.target import Say, Target, collect, number_of, open_target
from engine.training.trainable_heads import TrainableHeads
from engine.training.training_job import HeadsJob


def run(job: HeadsJob, say: Say) -> HeadsAccuracy:
    """Writes heads into `job.output`. What an earlier run of the same job has done is not done again.

    ValueError for what the user can mend, as `build_engine` raises it.
    """
    target, collector, model = open_target(job, say)
    transcripts = collect(job, collector, model.eos_token_ids)
    known = frequent_tokens(transcripts, count=job.num_known_tokens, vocab_size=target.vocab_size)
    output = target.output_rows(known).clone()  # no tensor of inference
    torch.set_num_threads(number_of(model, "device.num_threads"))  # of which compiled layers had left it one
    data = make_data(transcripts, known, output, vocab_size=target.vocab_size)
    if not len(data.learned) or not len(data.held_out):
        raise ValueError(f"{len(transcripts.lengths)} sequences are too few to learn from; give more text, or prompts")
    say(f"learning from {len(data.learned):,} tokens of {len(transcripts.lengths):,} sequences")
    heads = _train(job, data, output)
    return _write(job, heads, data, target)


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
