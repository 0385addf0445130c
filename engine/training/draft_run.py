"""The stages of making a draft model: cut it out of the target, collect what that says, learn it, measure, write."""

from __future__ import annotations

import torch

from engine.loading.loader import read_tokenizer
from engine.training.draft_accuracy import DraftAccuracy, measure_draft
from engine.training.draft_data import DraftData, make_draft_data
from engine.training.draft_trainer import DraftTrainer
from engine.training.heads_data import frequent_tokens
from engine.training.pruned_model import PrunedModel, prune
from engine.training.target import Say, collect, number_of, open_target
from engine.training.training_job import DraftJob


def run_draft(job: DraftJob, say: Say) -> DraftAccuracy:
    """Writes a model into `job.output`. What an earlier run of the same job has done is not done again.

    ValueError for what the user can mend, as `build_engine` raises it.
    """
    model = prune(job.engine.model, job.num_layers)  # first: what cannot be is said before hours of collecting
    data, num_threads = _collect(job, say)
    torch.set_num_threads(num_threads)
    torch.manual_seed(job.seed)
    say(
        f"teaching {model.num_layers} layers {int(data.starts[-1]):,} tokens of {len(data.learned):,} texts, "
        f"{len(data.held_out):,} are held out"
    )
    trainer = DraftTrainer(
        model,
        data,
        batch_size=job.batch_size,
        num_epochs=job.num_epochs,
        learning_rate=job.learning_rate,
        seed=job.seed,
    )
    trainer.train(job.state)
    return _write(job, model, data)


def _collect(job: DraftJob, say: Say) -> tuple[DraftData, int]:
    """The data, and the threads that learning may take. The target is let go."""
    target, collector, info = open_target(job, say)
    transcripts = collect(job, collector, info.eos_token_ids)
    known = frequent_tokens(transcripts, count=target.vocab_size, vocab_size=target.vocab_size)
    output = target.output_rows(known).clone()  # no tensor of inference
    num_threads = number_of(info, "device.num_threads")
    torch.set_num_threads(num_threads)  # of which compiled layers had left it one
    data = make_draft_data(transcripts, job.sequences, known, output, are_answers=job.kind == "answers")
    if not len(data.learned) or not len(data.held_out):
        raise ValueError(f"{len(transcripts.lengths)} sequences are too few to learn from; give more text, or prompts")
    return data, num_threads


def _write(job: DraftJob, model: PrunedModel, data: DraftData) -> DraftAccuracy:
    model.eval()
    accuracy = measure_draft(model, data, are_answers=job.kind == "answers")
    tokenizer = read_tokenizer(job.engine.model)
    model.save(job.output, tokenizer=tokenizer, fields={"peregrine_accepted": accuracy.accepted})
    return accuracy
