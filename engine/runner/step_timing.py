"""How long steps of some sizes take, measured once at the start, for whoever chooses the size of steps."""

from __future__ import annotations

import time

import torch

from engine.runner.executor import Executor
from engine.runner.step_builder import StepBuilder
from engine.runner.trial import FIRST_BLOCK, item_of_no_request

SIZES = (1, 4, 2, 8, 3, 6, 12, 5, 16, 24, 10, 32, 7, 48, 64, 96)  # those that say most come first
_NUM_ROUNDS = 3


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
            start = time.perf_counter()
            executor.run(builder.build(batch))
            builder.launched()
            seconds = time.perf_counter() - start
            fastest[size] = min(seconds, fastest.get(size, seconds))
    return fastest
