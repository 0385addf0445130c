"""Sampling and scoring of a vocabulary: the definition's tokens, bit by bit, and the time to read each row once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import kernels.reference.sampling
from kernels.triton.sampling.sample_tokens import sample_tokens
from kernels.triton.sampling.token_scores import penalise, score_tokens
from loadtest.gpu.context import Context, Job
from loadtest.gpu.errors import relative_error
from loadtest.gpu.machine import l2_bytes
from loadtest.gpu.records import Check, Record, Timing
from loadtest.gpu.stopwatch import Stopwatch, Work, num_sets

_KINDS = ("plain", "min-p", "top-k", "top-p", "all three", "equal logits", "greedy", "unusable")
_VOCAB_SIZE = 128256


def checks(context: Context) -> list[Job]:
    kinds = ("all three", "unusable") if context.is_rehearsal else _KINDS
    found = [Job(f"sampling, {kind}", partial(_sample, context, kind)) for kind in kinds]
    return [*found, Job("penalties", lambda: _penalise(context)), Job("token scores", lambda: _score(context))]


def sampling_arguments(kind: str, num_rows: int, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """What `sample_tokens` takes, on the generator's device, with the limits that `kind` names."""
    device = generator.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_rows, device=device, generator=generator, dtype=torch.float64)

    logits = 3 * torch.randn(num_rows, vocab_size, device=device, generator=generator)
    if kind == "equal logits":
        logits = logits.round()
    if kind == "unusable":
        logits[0, 3], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    every = kind in ("all three", "equal logits")
    max_gaps = -uniform(1e-4, 0.3).log() if every or kind == "min-p" else torch.full_like(uniform(0, 1), torch.inf)
    top_ks = uniform(1, 60).long() if every or kind == "top-k" else uniform(0, 1).long() + vocab_size
    top_ps = uniform(0.1, 0.999) if every or kind == "top-p" else torch.ones_like(uniform(0, 1))
    temperatures = torch.zeros_like(top_ps) if kind == "greedy" else uniform(0.3, 2.0)
    keys = torch.randint(-(2**31), 2**31, (num_rows, 2), device=device, generator=generator)
    return logits, temperatures.float(), keys.int(), max_gaps.float(), top_ks, top_ps


def _sizes(context: Context) -> tuple[int, int]:
    return (3, 40) if context.is_rehearsal else (24, _VOCAB_SIZE)


def _sample(context: Context, kind: str) -> Iterator[Record]:
    arguments = sampling_arguments(kind, *_sizes(context), context.generator(kind))
    found = sample_tokens(*arguments).cpu()
    expected = kernels.reference.sampling.sample_tokens(*(x.cpu() for x in arguments))
    yield Check(f"sampling, {kind}", float((found != expected).sum()), 0.0)


def _penalise(context: Context) -> Iterator[Record]:
    generator, device = context.generator("penalties"), context.device
    num_rows, vocab_size = _sizes(context)
    logits = 5 * torch.randn(num_rows, vocab_size, device=device, generator=generator)
    counts = torch.randint(-3, 4, (num_rows, vocab_size), device=device, generator=generator).clamp_min(0).int()
    is_in_prompt = torch.rand(num_rows, vocab_size, device=device, generator=generator) < 0.1
    states = torch.randperm(num_rows, device=device, generator=generator)
    columns = torch.rand(3, num_rows, device=device, generator=generator, dtype=torch.float64)
    arguments = (counts, is_in_prompt, states, 0.5 + columns[0].float(), columns[1], columns[2])
    expected = logits.clone()
    penalise(logits, *arguments)
    kernels.reference.sampling.penalise(expected, *arguments)
    yield Check("penalties", relative_error(logits, expected), 1e-7)


def _score(context: Context) -> Iterator[Record]:
    generator = context.generator("token scores")
    num_rows, vocab_size = _sizes(context)
    logits = 4 * torch.randn(num_rows, vocab_size, device=context.device, generator=generator)
    tokens = torch.randint(0, vocab_size, (num_rows,), device=context.device, generator=generator)
    logprobs, ranks = score_tokens(logits, tokens)
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    yield Check("log-probabilities", float((logprobs - expected).abs().max()), 2e-5)
    is_ahead = logits > logits.gather(1, tokens[:, None])
    yield Check("ranks", float((ranks != is_ahead.sum(-1) + 1).sum()), 0.0)


def timings(context: Context) -> list[Job]:
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
    is_random, is_truncated = kind != "greedy", kind not in ("greedy", "plain")  # as the engine knows
    works: dict[str, Work] = {
        "": lambda index: sample_tokens(*sets[index], is_random=is_random, is_truncated=is_truncated),
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
