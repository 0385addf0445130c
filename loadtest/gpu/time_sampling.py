"""Sampling and scoring of a vocabulary: a row is read once from memory, and then from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import kernels.reference.sampling
from kernels.triton.sampling.sample_tokens import sample_tokens
from kernels.triton.sampling.token_scores import score_tokens
from loadtest.gpu.check_sampling import sampling_arguments
from loadtest.gpu.context import Context, Job
from loadtest.gpu.machine import l2_bytes
from loadtest.gpu.records import Record, Timing
from loadtest.gpu.stopwatch import Stopwatch, Work, num_sets

_VOCAB_SIZE = 128256


def jobs(context: Context) -> list[Job]:
    rows = (2,) if context.is_rehearsal else (1, 32, 128)
    kinds = ("all three",) if context.is_rehearsal else ("greedy", "plain", "top-p", "all three")
    found = []
    for num_rows in rows:
        for kind in kinds:
            name = f"sampling, {kind}, {num_rows} rows"
            found.append(Job(name, partial(_time_sampling, context, name, kind, num_rows)))
        name = f"log-probabilities, {num_rows} rows"
        found.append(Job(name, partial(_time_scores, context, name, num_rows)))
    return found


def _time_sampling(context: Context, name: str, kind: str, num_rows: int) -> Iterator[Record]:
    vocab_size = 40 if context.is_rehearsal else _VOCAB_SIZE
    generator = context.generator(name)
    count = num_sets(4 * num_rows * vocab_size, l2_bytes(context.device))
    sets = [sampling_arguments(kind, num_rows, vocab_size, generator) for _ in range(count)]
    spared = {"is_random": kind != "greedy", "is_truncated": kind not in ("greedy", "plain")}  # as the engine knows
    works: dict[str, Work] = {
        "": lambda index: sample_tokens(*sets[index], **spared),
        "torch, by sorting": lambda index: kernels.reference.sampling.sample_tokens(*sets[index]),
    }
    seconds = Stopwatch(context.device, num_rounds=5).compare(works, num_sets=count)
    floor = context.floor(num_bytes=4 * num_rows * vocab_size)
    yield Timing(name, seconds.pop(""), floor, peers=seconds)


def _time_scores(context: Context, name: str, num_rows: int) -> Iterator[Record]:
    vocab_size = 40 if context.is_rehearsal else _VOCAB_SIZE
    generator, device = context.generator(name), context.device
    count = num_sets(4 * num_rows * vocab_size, l2_bytes(device))
    logits = torch.randn(count, num_rows, vocab_size, device=device, generator=generator)
    tokens = torch.randint(0, vocab_size, (num_rows,), device=device, generator=generator)
    works: dict[str, Work] = {
        "": lambda index: score_tokens(logits[index], tokens),
        "torch, eager": lambda index: kernels.reference.sampling.score_tokens(logits[index], tokens),
    }
    seconds = Stopwatch(device).compare(works, num_sets=count)
    floor = context.floor(num_bytes=4 * num_rows * vocab_size)
    yield Timing(name, seconds.pop(""), floor, peers=seconds)
