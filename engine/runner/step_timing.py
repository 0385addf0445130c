"""How long steps of some sizes take, measured once at the start, for whoever chooses the size of steps."""

from __future__ import annotations

import time

import torch

from engine.runner.executor import Executor
from engine.runner.step_builder import StepBuilder
from engine.types import Request, SamplingParams, Scheduled, Sequence

SIZES = (1, 4, 2, 8, 3, 6, 12, 5, 16, 24, 10, 32, 7, 48, 64, 96)  # those that say most come first
_NUM_ROUNDS = 3
_FIRST_BLOCK = 1  # after the null block; free, and written anew by whoever gets it


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
            batch = [_item(size, builder)]
            start = time.perf_counter()
            executor.run(builder.build(batch))
            builder.launched()
            seconds = time.perf_counter() - start
            fastest[size] = min(seconds, fastest.get(size, seconds))
    return fastest


def _item(size: int, builder: StepBuilder) -> Scheduled:
    request = Request(
        request_id="timing", prompt_token_ids=[0], params=SamplingParams(seed=0, max_tokens=1, temperature=0)
    )
    num_groups, num_blocks = builder.tables.num_groups, -(-size // builder.block_size)
    tables = [list(range(_FIRST_BLOCK, _FIRST_BLOCK + num_blocks)) for _ in range(num_groups)]
    seq = Sequence(
        request,
        [0],
        draft_token_ids=[0] * (size - 1),
        draft_parents=list(range(-1, size - 2)),
        block_tables=tables,
        num_released_blocks=[0] * num_groups,
    )
    return Scheduled(seq, size, size - 1, samples=True)
