"""Attention over the paged cache of a step, and over that of whole prompts, in Llama-3.1-8B's heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from loadtest.gpu.attention_case import AttentionCase, Heads, Lens, make_case
from loadtest.gpu.attention_peers import COMPILED_PEERS, PEERS, Attend
from loadtest.gpu.context import Context, Job
from loadtest.gpu.errors import relative_error
from loadtest.gpu.machine import l2_bytes
from loadtest.gpu.records import Problem, Record, Timing
from loadtest.gpu.stopwatch import Stopwatch, num_sets

LLAMA = Heads(32, 8, 128)
DECODES = [(1, 4096), (8, 4096), (32, 1024), (32, 4096), (128, 1024), (128, 4096), (8, 16384)]
PROMPTS = [(1, 1024), (1, 4096), (4, 4096), (1, 16384)]
_COMPILED_FOR = {(32, 4096), (1, 4096)}  # what takes long to compile is timed on these alone
_AGREEMENT = 0.02  # relative error between two implementations in bfloat16


def jobs(context: Context) -> list[Job]:
    decodes, prompts, heads = DECODES, PROMPTS, LLAMA
    if context.is_rehearsal:
        decodes, prompts, heads = [(2, 40)], [(1, 24)], Heads(2, 1, 16)
    return [
        Job(name, partial(_time, context, name, heads, lens, PEERS)) for name, lens in _cases(decodes, prompts).items()
    ]


def late_jobs(context: Context) -> list[Job]:
    """Against peers that are compiled first: should that take too long, nothing else is lost with it."""
    decodes, prompts = ([case for case in cases if case in _COMPILED_FOR] for cases in (DECODES, PROMPTS))
    return [
        Job(title, partial(_time, context, title, LLAMA, lens, COMPILED_PEERS))
        for name, lens in ({} if context.is_rehearsal else _cases(decodes, prompts)).items()
        for title in [f"{name}, beside what is compiled"]
    ]


def _cases(decodes: list[tuple[int, int]], prompts: list[tuple[int, int]]) -> dict[str, Lens]:
    """By name. Pairs are sequences, and tokens of each."""
    found: dict[str, Lens] = {}
    for batch, length in decodes:
        found[f"decode attention, {batch} x {length}"] = [(1, length)] * batch
    for batch, length in prompts:
        found[f"prefill attention, {batch} x {length}"] = [(length, length)] * batch
    return found


def _time(
    context: Context, name: str, heads: Heads, lens: Lens, peers: dict[str, Callable[[AttentionCase], Attend]]
) -> Iterator[Record]:
    dtype = torch.float32 if context.is_rehearsal else torch.bfloat16
    first = make_case(heads, lens, dtype, context.generator(name))
    count = min(4 if context.is_rehearsal else 64, num_sets(first.num_bytes, l2_bytes(context.device)))
    more = [make_case(heads, lens, dtype, context.generator(f"{name} {i}")) for i in range(1, count)]
    cases = [first, *more]
    ours: list[Attend] = [partial(case.run, case.prepare()) for case in cases]
    works: dict[str, Callable[[int], object]] = {"": lambda index: ours[index]()}
    expected = ours[0]()
    for peer, make in peers.items():
        try:
            attends = [make(case) for case in cases]
            error = relative_error(attends[0](), expected)
        except Exception as failure:  # what others raise is theirs; our own figure must not be lost with it
            first_line = next(iter(str(failure).splitlines()), "")
            yield Problem(f"{peer}, {name}", f"{type(failure).__name__}: {first_line[:300]}")
            continue
        if not error <= _AGREEMENT:
            yield Problem(f"{peer}, {name}", f"it disagrees: relative error {error:.2g}")
            continue
        works[peer] = lambda index, attends=attends: attends[index]()
    seconds = Stopwatch(context.device).compare(works, num_sets=count)
    yield Timing(name, seconds.pop(""), _floor(context, first), peers=seconds)


def _floor(context: Context, case: AttentionCase) -> float | None:
    return context.floor(num_bytes=case.num_bytes, num_flops=case.num_flops)
