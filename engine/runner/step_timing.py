"""How long steps of some sizes take, measured once at the start, for whoever chooses the size of steps."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from engine.runner.executor import Executor
from engine.runner.step_builder import StepBuilder
from engine.runner.trial import FIRST_BLOCK, chunk_of_no_request, item_of_no_request
from engine.scheduling.step_work import StepWork, count_work
from engine.types import Scheduled

SIZES = (1, 4, 2, 8, 3, 6, 12, 5, 16, 24, 10, 32, 7, 48, 64, 96)  # those that say most come first
_NUM_ROUNDS = 3
_CONTEXT = 2048  # tokens of it that a chunk sees, where so many fit
_CHUNKS = (32, 16, 8)  # tokens of such chunks: the largest whose rows alone take no longer than
_MAX_SECONDS_OF_CHUNK = 0.15


@torch.inference_mode()
def time_steps(
    executor: Executor, builder: StepBuilder, *, max_rows: int, max_seconds: float = 1.5
) -> dict[int, float]:
    """The least seconds of verifying a run of drafts, by rows: the newest token, and the drafts behind it.

    Before anything is served: it writes into free blocks. Ends in time, however slow the model is, with fewer sizes.
    """
    end = time.perf_counter() + max_seconds
    fastest: dict[int, float] = {}
    for _ in range(_NUM_ROUNDS):
        for size in SIZES:
            if size > max_rows:
                continue
            if len(fastest) > 1 and time.perf_counter() > end:
                return fastest
            batch = [item_of_no_request(builder, first_block=FIRST_BLOCK, num_drafts=size - 1, temperature=0.0)]
            seconds = _seconds_of(executor, builder, batch)
            fastest[size] = min(seconds, fastest.get(size, seconds))
    return fastest


@torch.inference_mode()
def time_chunks(
    executor: Executor, builder: StepBuilder, *, max_context: int, by_rows: Mapping[int, float]
) -> list[tuple[StepWork, float]]:
    """The least seconds of prompt chunks and of a single token, each with a context and without: what attention costs.

    As `time_steps`, whose result `by_rows` is. Empty where even short chunks take too long for a start.
    """
    chunk = next((size for size in _CHUNKS if by_rows.get(size, 1.0) < _MAX_SECONDS_OF_CHUNK), 0)
    context = min(_CONTEXT, max_context - chunk)
    if not chunk or context < 1:
        return []
    fastest: dict[tuple[int, int], tuple[StepWork, float]] = {}
    for _ in range(_NUM_ROUNDS):
        for num_computed, num_new_tokens in ((0, chunk), (context, chunk), (context, 1)):
            batch = [chunk_of_no_request(builder, num_computed, num_new_tokens)]
            work, seconds = count_work(batch), _seconds_of(executor, builder, batch)
            key = num_computed, num_new_tokens
            fastest[key] = work, min(seconds, fastest.get(key, (work, seconds))[1])
    return list(fastest.values())


def _seconds_of(executor: Executor, builder: StepBuilder, batch: list[Scheduled]) -> float:
    start = time.perf_counter()
    executor.run(builder.build(batch))
    builder.launched()
    return time.perf_counter() - start
